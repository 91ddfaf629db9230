"""Whatever lies in a file that we read, it is read or refused: no other error, no large allocation."""

from __future__ import annotations

import contextlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.core import slots
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import TensorSpec, parse_file, plan_file
from async_ckpt.core.manifest import FileEntry, Manifest, decode_manifest, encode_manifest
from async_ckpt.core.protocol import SaveRecord
from async_ckpt.core.slots import Peer, Phase, RunRecord, SlotPaths, StateFile, read_journals
from tests.saver.saver_process import register

HEADER = plan_file("f", [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "BF16", (5,))]).header
MANIFEST = encode_manifest(
    Manifest(format=1, step=3, metrics={"loss": 0.5}, extra=[1], files={"a": FileEntry(3, "0" * 32)})
)
RECORD = msgspec.msgpack.encode(SaveRecord(3, {"loss": 0.5}, {"a": [1]}, {"d": b"x"}))
_REGISTER = register(Path("/data/run"))
JOURNAL = msgspec.msgpack.encode(
    RunRecord("job", _REGISTER.options, ["f"], [Peer(0, b"me", _REGISTER.process)], None, {})
)


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """Cut, with bits flipped, with bytes put in or doubled."""
    position = st.integers(0, len(data))
    return st.one_of(
        position.map(lambda at: data[:at]),
        st.tuples(position, st.binary(min_size=1, max_size=12)).map(lambda p: data[: p[0]] + p[1] + data[p[0] :]),
        st.lists(st.integers(0, len(data) * 8 - 1), min_size=1, max_size=6).map(lambda bits: _flipped(data, bits)),
        st.tuples(position, position).map(lambda p: data[: max(p)] + data[min(p) :]),
    )


def _flipped(data: bytes, bits: list[int]) -> bytes:
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@settings(max_examples=800)
@given(damaged(HEADER))
def test_safetensors_headers(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        parse_file("f", data)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [1e400]}, {"shape": [1.5]}, {"shape": [True]}, {"shape": "1"}, {"shape": [10**400]}, {"shape": [-1]},
        {"shape": [2**63]}, {"shape": {"1": 1}}, {"shape": None}, {"dtype": ["F32"]}, {"dtype": "F3"}, {"dtype": "F4"},
        {"data_offsets": [0]}, {"data_offsets": [0, 4, 8]}, {"data_offsets": "04"}, {"data_offsets": [0, 1e400]},
        {"data_offsets": [0, 2**70]},
    ],
)  # fmt: skip
def test_headers_with_absurd_numbers(entry: dict[str, object]) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
    with pytest.raises(CheckpointError, match=r"does not begin with a safetensors header|lies at bytes"):
        parse_file("f", len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000, b'{"a":' * 100_000, b"[1]", b"1", b'"a"', b"null", b'{"a":1}', b"\xff\xfe",
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9," * 5000 + b'9],"data_offsets":[0,4]}}',
    ],
)  # fmt: skip
def test_headers_that_are_something_else(text: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_file("f", len(text).to_bytes(8, "little") + text)


@settings(max_examples=800)
@given(damaged(MANIFEST))
def test_manifests(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        decode_manifest(data)


@pytest.mark.parametrize(
    "extra", [b"[" * 5000 + b"]" * 5000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"1e999", b"9" * 5000]
)
def test_manifests_with_absurd_values(extra: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        decode_manifest(MANIFEST.replace(b'"extra": [\n    1\n  ]', b'"extra": ' + extra))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@settings(max_examples=800)
@given(damaged(RECORD))
def test_records(folder: Path, data: bytes) -> None:
    paths = SlotPaths(folder, 0)
    paths.record(0).write_bytes(data)
    with contextlib.suppress(CheckpointError):
        paths.read_record(0)


def test_a_record_nested_without_end(folder: Path) -> None:
    paths = SlotPaths(folder, 1)
    paths.record(0).write_bytes(RECORD.replace(msgspec.msgpack.encode({"a": [1]}), b"\x91" * 100_000 + b"\xc0"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        paths.read_record(0)


@settings(max_examples=800)
@given(damaged(JOURNAL))
def test_journals_are_read_or_swept(folder: Path, data: bytes) -> None:
    original, slots.SHM = slots.SHM, folder
    try:
        run = slots.new_run_path("ipc:///e")
        run.mkdir(mode=0o700)
        (run / "run.msgpack").write_bytes(data)
        found = list(read_journals("ipc:///e"))
        assert run.exists() == bool(found)
        slots.remove_run(run)
    finally:
        slots.SHM = original


def test_a_journal_with_a_policy_that_is_not_allowed_is_swept(folder: Path) -> None:
    raw = msgspec.msgpack.decode(JOURNAL)
    raw["options"]["policy"]["keep_last"] = 0
    original, slots.SHM = slots.SHM, folder
    try:
        run = slots.new_run_path("ipc:///e")
        run.mkdir(mode=0o700)
        (run / "run.msgpack").write_bytes(msgspec.msgpack.encode(raw))
        assert list(read_journals("ipc:///e")) == []
        assert not run.exists()
    finally:
        slots.SHM = original


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user as well")
def test_what_another_user_left_in_shared_memory_is_neither_believed_nor_removed(folder: Path) -> None:
    original, slots.SHM = slots.SHM, folder
    try:
        theirs, link = slots.new_run_path("ipc:///e"), slots.new_run_path("ipc:///e")
        theirs.mkdir(mode=0o700)
        (theirs / "run.msgpack").write_bytes(JOURNAL)
        os.chown(theirs, 65534, 65534)
        link.symlink_to(theirs)
        assert list(read_journals("ipc:///e")) == []
        assert (theirs / "run.msgpack").exists()
        assert link.is_symlink()
        (folder / f"async-ckpt-{os.getuid()}").rename(folder / "moved")
        (folder / f"async-ckpt-{os.getuid()}").mkdir(mode=0o700)
        os.chown(folder / f"async-ckpt-{os.getuid()}", 65534, 65534)
        with pytest.raises(CheckpointError, match="has uid 65534"):
            slots.shm_root()
        (folder / f"async-ckpt-{os.getuid()}").rmdir()
        (folder / f"async-ckpt-{os.getuid()}").symlink_to(folder / "moved")
        with pytest.raises(CheckpointError, match="must be a directory"):
            slots.shm_root()
    finally:
        slots.SHM = original


def test_what_is_made_in_shared_memory_is_for_this_user_alone(folder: Path) -> None:
    umask = os.umask(0)
    try:
        paths = SlotPaths(folder, 2)
        paths.write_record(0, SaveRecord(1, {}, None, {}))
        StateFile.create(paths.state, 1)
        slots.write_journal(folder, msgspec.msgpack.decode(JOURNAL, type=RunRecord))
    finally:
        os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in (paths.record(0), paths.state, folder / "run.msgpack")}
    assert modes == {0o600}


@settings(max_examples=300)
@given(st.data())
def test_state_files(folder: Path, data: st.DataObject) -> None:
    path = folder / "slot-3.state"
    path.unlink(missing_ok=True)
    StateFile.create(path, 2)
    state = StateFile(path)
    state.mark(0, Phase.STAGED, 7)
    state.close()
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        state = StateFile(path)
    except CheckpointError:
        return
    for rank in range(state.world):
        assert state.cell(rank).phase in (Phase.EMPTY, Phase.WRITING, Phase.STAGED)
    state.close()


@pytest.mark.parametrize(
    ("read", "data"),
    [
        (lambda data: parse_file("f", data), b"\xff" * 7 + b"\x00" + b"{" * 64),
        (lambda data: parse_file("f", data), (10**8).to_bytes(8, "little") + b"{}"),
        (lambda data: msgspec.msgpack.decode(data, type=SaveRecord), b"\xdf\xff\xff\xff\xff" + b"x" * 64),
        (lambda data: msgspec.msgpack.decode(data, type=SaveRecord), b"\xdd\xff\xff\xff\xff" + b"x" * 64),
    ],
)
def test_a_length_that_is_a_lie_allocates_nothing(read: Callable[[bytes], object], data: bytes) -> None:
    tracemalloc.start()
    with pytest.raises((CheckpointError, msgspec.DecodeError)):
        read(data)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
