"""Each cap holds at its value and not one beyond, and is named to whoever meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from async_ckpt.core import limits, protocol, slots
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import MAX_HEADER_BYTES, TensorSpec, header_bytes, parse_file, plan_file
from async_ckpt.core.manifest import check_path, checkpoint_name, decode_manifest
from async_ckpt.core.protocol import Layout, Options, Ping, SaveRecord, Staged, decode_from_rank, encode
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import SlotPaths
from async_ckpt_saver.refusals import Refusals
from async_ckpt_saver.registration import Refusal, Registration, check_layout
from tests.saver.saver_process import LAYOUT, register

DIRECTORY = Path("/data/run")
REGISTER = register(DIRECTORY)


def spoilt(path: str, value: object) -> bytes:
    raw = msgspec.msgpack.decode(encode(REGISTER))
    inner = raw
    *parents, last = path.split(".")
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return msgspec.msgpack.encode(raw)


BOX = [0, 0, [False, [0], [8]]]
STAGED = {"type": "Staged", "seq": 1, "slot": 0, "step": 1, "copy_s": 0.0}


@pytest.mark.parametrize(
    ("at_the_cap", "beyond"),
    [
        (spoilt("options.directory", "/" * limits.MAX_DIRECTORY_CHARS),
         spoilt("options.directory", "/" * (limits.MAX_DIRECTORY_CHARS + 1))),
        (spoilt("options.timeout_s", limits.MAX_TIMEOUT_S), spoilt("options.timeout_s", limits.MAX_TIMEOUT_S + 1)),
        (spoilt("job", "j" * limits.MAX_NAME_CHARS), spoilt("job", "j" * (limits.MAX_NAME_CHARS + 1))),
        (spoilt("process.pid", limits.MAX_PID), spoilt("process.pid", limits.MAX_PID + 1)),
        (spoilt("claims", [b"", b"", [BOX] * limits.MAX_CLAIMS]),
         spoilt("claims", [b"", b"", [BOX] * (limits.MAX_CLAIMS + 1)])),
        (spoilt("claims", [bytes(8 * limits.MAX_CLAIMS), b"", []]),
         spoilt("claims", [bytes(8 * limits.MAX_CLAIMS + 8), b"", []])),
        (spoilt("claims", [b"", bytes(8 * limits.MAX_CLAIMS), []]),
         spoilt("claims", [b"", bytes(8 * limits.MAX_CLAIMS + 8), []])),
        (spoilt("claims", [b"", b"", [[0, 0, [False, [0] * n, [1] * n]] for n in (limits.MAX_DIMENSIONS,)]]),
         spoilt("claims", [b"", b"", [[0, 0, [False, [0] * n, [1] * n]] for n in (limits.MAX_DIMENSIONS + 1,)]])),
        *((msgspec.msgpack.encode(STAGED | {key: cap}), msgspec.msgpack.encode(STAGED | {key: cap + 1}))
          for key, cap in (("slot", limits.MAX_SLOTS - 1), ("step", limits.MAX_STEP), ("seq", limits.MAX_SEQUENCE))),
        (encode(Ping(unsettled=[1] * limits.MAX_UNSETTLED)), encode(Ping(unsettled=[1] * (limits.MAX_UNSETTLED + 1)))),
        (encode(Ping(unsettled=[], not_uploaded=[1] * limits.MAX_UNSETTLED)),
         encode(Ping(unsettled=[], not_uploaded=[1] * (limits.MAX_UNSETTLED + 1)))),
    ],
)  # fmt: skip
def test_fields_of_messages(at_the_cap: bytes, beyond: bytes) -> None:
    decode_from_rank(at_the_cap)
    with pytest.raises(msgspec.ValidationError, match=r"Expected .*(<=|<|length)"):
        decode_from_rank(beyond)


@pytest.mark.parametrize(
    ("change", "value", "words"),
    [
        ("world", limits.MAX_WORLD, None),
        ("world", limits.MAX_WORLD + 1, f"at most {limits.MAX_WORLD}"),
        ("slots", limits.MAX_SLOTS, None),
        ("slots", limits.MAX_SLOTS + 1, f"between 1 and {limits.MAX_SLOTS}"),
    ],
)
def test_ranks_and_slots(change: str, value: int, words: str | None) -> None:
    options = msgspec.structs.replace(REGISTER.options, **{change: value})
    verdict = Registration(options, "job", 0.0).add(b"me", msgspec.structs.replace(REGISTER, options=options))
    if words is None:
        assert not isinstance(verdict, Refusal)
    else:
        assert isinstance(verdict, Refusal)
        assert words in verdict.reason


def test_files_and_tensors_of_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = {f"d{number}": b"" for number in range(limits.MAX_FILES - 1)}  # and the one file
    check_layout(Layout(LAYOUT.files, documents))
    with pytest.raises(CheckpointError, match=f"has {limits.MAX_FILES + 1} files, at most {limits.MAX_FILES}"):
        check_layout(Layout(LAYOUT.files, documents | {"more": b""}))
    monkeypatch.setattr("async_ckpt.core.layout.MAX_TENSORS", 3)
    monkeypatch.setattr("async_ckpt_saver.registration.MAX_TENSORS", 3)
    three = [TensorSpec(name, "F32", (1,)) for name in "abc"]
    header = plan_file("f", three).header
    assert len(parse_file("f", header).extents) == 3
    with pytest.raises(CheckpointError, match="4 tensors, at most 3"):
        plan_file("f", [*three, TensorSpec("d", "F32", (1,))])


def test_dimensions_headers_paths_and_steps() -> None:
    for count, fits in ((limits.MAX_DIMENSIONS, True), (limits.MAX_DIMENSIONS + 1, False)):
        text = b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[0,4]}}' % str([1] * count).encode()
        head = len(text).to_bytes(8, "little") + text
        if fits:
            parse_file("f", head)
        else:
            with pytest.raises(CheckpointError, match=f"{count} dimensions, at most {limits.MAX_DIMENSIONS}"):
                parse_file("f", head)
    assert header_bytes(MAX_HEADER_BYTES.to_bytes(8, "little")) == MAX_HEADER_BYTES + 8
    with pytest.raises(ValueError, match=f"at most {MAX_HEADER_BYTES}"):
        header_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    check_path("x" * limits.MAX_PATH_BYTES)
    with pytest.raises(CheckpointError, match=f"at most {limits.MAX_PATH_BYTES}"):
        check_path("x" * (limits.MAX_PATH_BYTES + 1))
    checkpoint_name(limits.MAX_STEP)
    with pytest.raises(CheckpointError, match=str(limits.MAX_STEP)):
        checkpoint_name(limits.MAX_STEP + 1)
    with pytest.raises(CheckpointError, match=str(limits.MAX_MANIFEST_BYTES)):
        decode_manifest(b" " * (limits.MAX_MANIFEST_BYTES + 1))


def nested(depth: int) -> Any:
    value: Any = 0
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    return value


def test_depth() -> None:
    limits.check_depth(nested(limits.MAX_JSON_DEPTH), "extra")
    with pytest.raises(CheckpointError, match=f"extra is nested deeper than {limits.MAX_JSON_DEPTH}"):
        limits.check_depth(nested(limits.MAX_JSON_DEPTH + 1), "extra")
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CheckpointError, match="nested"):
        limits.check_depth(endless, "extra")


def test_records_and_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, record = SlotPaths(tmp_path, 0), SaveRecord(1, {}, None, {})
    size_bytes = len(msgspec.msgpack.encode(record))
    monkeypatch.setattr(slots, "MAX_RECORD_BYTES", size_bytes)
    paths.write_record(0, record)
    assert paths.read_record(0) == record
    with pytest.raises(CheckpointError, match=f"at most {size_bytes}"):
        paths.write_record(0, SaveRecord(1, {}, "x", {}))
    paths.record(0).write_bytes(msgspec.msgpack.encode(record) + b" ")
    with pytest.raises(CheckpointError, match=f"more than {size_bytes} bytes"):
        paths.read_record(0)
    message_bytes = len(encode(REGISTER))
    monkeypatch.setattr(protocol, "MAX_MESSAGE_BYTES", message_bytes)
    protocol.check_sendable(REGISTER)
    with pytest.raises(CheckpointError, match="MAX_MESSAGE_BYTES"):
        protocol.check_sendable(msgspec.structs.replace(REGISTER, job="longer"))


def test_remembered_refusals() -> None:
    refusals = Refusals()
    for number in range(limits.MAX_REMEMBERED_REFUSALS + 1):
        refusals.remember(f"job-{number}", "why", 1, 0.0)
    assert refusals.tell("job-0") is None
    assert refusals.tell("job-1") == "why"
    assert refusals.tell(f"job-{limits.MAX_REMEMBERED_REFUSALS}") == "why"


def test_a_region_of_a_message_is_what_was_sent() -> None:
    assert decode_from_rank(encode(REGISTER)).claims.lengths == (8).to_bytes(8, "little")  # type: ignore[union-attr]
    assert decode_from_rank(encode(Staged(seq=1, slot=0, step=2, copy_s=0.5)))
    assert Options(str(DIRECTORY), 1, 2, Policy(), 60.0) == REGISTER.options
