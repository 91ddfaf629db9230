from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import (
    Chunks,
    FileEntry,
    Manifest,
    check_path,
    checkpoint_name,
    committed,
    decode_manifest,
    encode_manifest,
    is_sealed,
    latest,
    parse_step,
    read_manifest,
)

HASH = "0123456789abcdef0123456789abcdef"


def manifest_of(**changes: object) -> Manifest:
    fields = {"format": 1, "step": 1, "metrics": {}, "extra": {}, "files": {"a": FileEntry(8, HASH)}} | changes
    return Manifest(**fields)  # type: ignore[arg-type]


def make(root: Path, step: int, **changes: object) -> Path:
    path = root / checkpoint_name(step)
    path.mkdir(parents=True)
    (path / "async_ckpt.json").write_bytes(encode_manifest(manifest_of(step=step, **changes)))
    return path


def test_the_file_is_what_the_design_promises(tmp_path: Path) -> None:
    path = make(tmp_path, 7, metrics={"loss": 1.5, "epoch": 2}, extra={"note": ["a", {"b": None}]}, world=4)
    raw = json.loads((path / "async_ckpt.json").read_text())
    data = (path / "async_ckpt.json").read_bytes()
    before = data[: data.rindex(b'"', 0, data.rindex(b'"'))]
    assert raw == {
        "format": 1,
        "step": 7,
        "metrics": {"loss": 1.5, "epoch": 2},
        "extra": {"note": ["a", {"b": None}]},
        "files": {"a": {"bytes": 8, "xxh3_128": HASH}},
        "world": 4,
        "versions": {},
        "run": "",
        "created_unix_s": 0.0,
        "chunks": None,
        "self_xxh3_128": xxhash.xxh3_128_hexdigest(before),
    }
    assert list(raw)[-1] == "self_xxh3_128"


def test_a_flipped_bit_anywhere_breaks_the_seal() -> None:
    data = encode_manifest(manifest_of(metrics={"loss": 0.1}, chunks=Chunks(4, {"a": ["0" * 16, "f" * 16]})))
    assert is_sealed(data)
    flipped = bytearray(data)
    for bit in range(len(data) * 8):
        flipped[bit // 8] ^= 1 << bit % 8
        assert not is_sealed(bytes(flipped)), bit
        flipped[bit // 8] ^= 1 << bit % 8
    assert len(data) > 300
    for length in range(len(data)):
        assert not is_sealed(data[:length])
    assert not is_sealed(data + b"\n")


texts = st.text(st.characters(codec="utf-8"), max_size=5)
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(texts, json_values, max_size=4))
def test_extra_comes_back_as_it_was(extra: dict[str, object]) -> None:
    written = manifest_of(extra=extra)
    assert decode_manifest(encode_manifest(written)) == written


def test_nan_and_infinity_become_none_and_later_fields_are_ignored() -> None:
    data = encode_manifest(manifest_of(metrics={"loss": float("nan"), "best": float("inf")}))
    later = json.dumps(json.loads(data) | {"a later field": [1]}).encode()
    assert decode_manifest(later).metrics == {"loss": None, "best": None}


@pytest.mark.parametrize(
    "fields",
    [
        {"step": -1},
        {"step": 10**18},
        {"extra": {"x": object()}},
        {"extra": {"x": "\ud800"}},
        {"metrics": {"loss": [1.0]}},
        {"files": {"../x": FileEntry(1, HASH)}},
        {"files": {"a": FileEntry(1, "not a hash")}},
        {"world": 0},
        {"extra": {"x": "y" * (16 << 20)}},
    ],
)
def test_what_could_not_be_read_back_is_refused_at_writing(fields: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        encode_manifest(manifest_of(**fields))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (b"", "truncated"),
        (b"{}", "missing"),
        (b"[]", "object"),
        (b"\xff\xfe", "damaged"),
        (b'{"format": 1, "step": 3, "metrics": {}, "files": {}, "extra": {"a": ' + b"[" * 100_000, "damaged"),
        (b'{"format": 3, "step": 3, "metrics": {}, "extra": {}, "files": {}}', "format 3"),
        (b'{"step": 3, "metrics": {}, "extra": {}, "files": {}}', "format"),
        (b'{"format": 1, "step": "3", "metrics": {}, "extra": {}, "files": {}}', "step"),
        (
            b'{"format": 1, "step": 3, "metrics": {}, "extra": {}, "files": {"/etc/passwd": {"bytes": 1, "xxh3_128": "'
            + HASH.encode()
            + b'"}}}',
            "passwd",
        ),
        (b" " * ((16 << 20) + 1), "larger"),
    ],
)
def test_damage_is_refused_with_the_path_and_the_reason(tmp_path: Path, damage: bytes, reason: str) -> None:
    path = make(tmp_path, 3)
    (path / "async_ckpt.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_manifest(path)
    assert str(path / "async_ckpt.json") in str(caught.value)
    assert latest(tmp_path) is None


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_no_bytes_raise_anything_but_our_error(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        decode_manifest(data)


def test_every_truncation_and_bit_flip_is_read_or_refused() -> None:
    whole = encode_manifest(manifest_of(step=3, metrics={"loss": 0.5})).rstrip()
    for cut in range(len(whole)):
        with pytest.raises(CheckpointError):
            decode_manifest(whole[:cut])
        flipped = bytearray(whole)
        flipped[cut] ^= 0x80
        with pytest.raises(CheckpointError):
            decode_manifest(bytes(flipped))


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-4/async_ckpt\.json.*No such file"):
        read_manifest(tmp_path / "checkpoint-4")


@given(st.integers(0, 10**18 - 1))
def test_names_and_steps_are_inverse(step: int) -> None:
    assert parse_step(checkpoint_name(step)) == step


@pytest.mark.parametrize(
    "name",
    ["checkpoint-", "checkpoint-01", "checkpoint--1", "checkpoint-1 ", "checkpoint-1\n", "checkpoint-\u0661", "latest",
     ".checkpoint-1.ab.tmp", "xcheckpoint-1", "checkpoint-1000000000000000000", "checkpoint-+1", "checkpoint-1_0"],
)  # fmt: skip
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert parse_step(name) is None


@pytest.mark.parametrize("step", [-1, 10**18])
def test_impossible_steps_have_no_name(step: int) -> None:
    with pytest.raises(CheckpointError, match=str(step)):
        checkpoint_name(step)


@pytest.mark.parametrize(
    "path",
    ["", "/a", "..", "../a", "a/../b", "a/..", ".", "./a", "a/./b", "a//b", "a/", "a\0b", "\ud800", "a" * 1025,
     "async_ckpt.json"],
)  # fmt: skip
def test_paths_that_lead_out_are_refused(path: str) -> None:
    with pytest.raises(CheckpointError):
        check_path(path)


@pytest.mark.parametrize("path", ["a", "a/b.json", "...", "..a", "ü/日本", "a b", "sub/async_ckpt.json"])
def test_plain_relative_paths_pass(path: str) -> None:
    assert check_path(path) == path


def test_latest_looks_at_the_checkpoints_not_at_the_link(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        make(tmp_path, step)
    newest = tmp_path / "checkpoint-100"
    assert latest(tmp_path) == newest
    os.symlink("checkpoint-20", tmp_path / "latest")
    assert latest(tmp_path) == newest
    os.unlink(tmp_path / "latest")
    os.symlink("checkpoint-5000", tmp_path / "latest")
    assert latest(tmp_path) == newest
    assert [step for step, _ in committed(tmp_path)] == [9, 20, 100]
    assert [path.name for _, path in committed(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]


def test_what_is_no_whole_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 5)
    (tmp_path / "checkpoint-10").mkdir()  # another program's
    make(tmp_path, 11).joinpath("async_ckpt.json").write_bytes(b"{")
    make(tmp_path / "elsewhere", 12).rename(tmp_path / "checkpoint-13")
    os.symlink("checkpoint-5", tmp_path / "checkpoint-14")
    (tmp_path / "checkpoint-15").write_bytes(b"a file")
    make(tmp_path / "elsewhere", 16).rename(tmp_path / ".checkpoint-16.ab.tmp")
    with caplog.at_level(logging.WARNING):
        assert committed(tmp_path) == [(5, tmp_path / "checkpoint-5")]
        assert latest(tmp_path) == tmp_path / "checkpoint-5"
    assert {record.args[0] for record in caplog.records if isinstance(record.args, tuple)} == {
        tmp_path / "checkpoint-11",
        tmp_path / "checkpoint-13",
    }


def test_the_path_is_the_directory_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "real", 1)
    os.symlink("real", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    assert latest("link") == Path("link/checkpoint-1")
    assert latest(str(tmp_path / "link")) == tmp_path / "link" / "checkpoint-1"


def test_no_directory_is_no_checkpoint_but_an_unreadable_one_is_an_error(tmp_path: Path) -> None:
    assert latest(tmp_path / "missing" / "deep") is None
    assert committed(tmp_path / "missing") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        latest(tmp_path / "file")


def test_a_pipe_of_the_manifests_name_hangs_nobody(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    os.mkfifo(checkpoint / "async_ckpt.json")
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_manifest(checkpoint)
