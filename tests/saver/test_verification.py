"""Damage is made in real checkpoints, byte by byte; what a sound one holds is known from safetensors and xxhash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.holding import BeingRead, removing
from async_ckpt.core.manifest import Manifest, encode_manifest, read_manifest
from async_ckpt_saver.datafile import Digests
from async_ckpt_saver.verification import Report, planned_bytes, verify
from tests.saver.checkpoints import ADAPTER, CONFIG, DOCUMENT, LARGE, LORA, STATE, adapter, commit_checkpoint, state

FILES = (ADAPTER, STATE, DOCUMENT, CONFIG, "async_ckpt.json")
CHUNK = 8 << 20
LARGE_ELEMENTS = (2 * CHUNK + CHUNK // 2) // 4


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    return commit_checkpoint(folder / "run", 3, folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    return commit_checkpoint(folder / "run", 3, folder, tensors=adapter(large_elements=LARGE_ELEMENTS))


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint-3"))


def damaged_files(report: Report) -> set[str]:
    return {damage.file for damage in report.damage}


def test_a_sound_checkpoint_is_sound(sound: Path) -> None:
    seen: list[int] = []
    report = verify(sound, seen.append)
    assert (report.damage, report.unlisted, report.step, report.files) == ([], [], 3, 6)
    assert sum(seen) == report.bytes == planned_bytes(sound)
    assert report.bytes == sum(path.stat().st_size for path in sound.rglob("*") if path.is_file()) - (
        (sound / "async_ckpt.json").stat().st_size
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(FILES), place=st.integers(0, 2**40))
def test_a_flipped_bit_anywhere_is_found(sound: Path, file: str, place: int) -> None:
    path = sound / file
    original = path.read_bytes()
    bit = place % (len(original) * 8)
    flipped = bytearray(original)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
        report = verify(sound)
    finally:
        path.write_bytes(original)
    assert file in damaged_files(report)
    assert any(
        damage.start is not None and damage.stop is not None and damage.start <= bit // 8 < damage.stop
        for damage in report.damage
        if damage.file == file
    )


@pytest.mark.parametrize("file", [*FILES, "README.md"])
@pytest.mark.parametrize("way", ["removed", "cut", "extended", "directory", "link"])
def test_files_that_are_missing_shorter_longer_or_something_else(copied: Path, file: str, way: str) -> None:
    path = copied / file
    data = path.read_bytes()
    if way == "cut" and not data:
        return
    path.unlink()
    if way == "cut":
        path.write_bytes(data[:-1])
    elif way == "extended":
        path.write_bytes(data + b"\n")
    elif way == "directory":
        path.mkdir()
    elif way == "link":
        (copied.parent / "elsewhere").write_bytes(data)
        path.symlink_to(copied.parent / "elsewhere")
        if file == "async_ckpt.json":
            return  # the same bytes: a reader of ours reads the same
    report = verify(copied)
    assert damaged_files(report) == {file}
    if way in ("cut", "extended") and file != "async_ckpt.json":
        ends = sorted((len(data), len(data) + (1 if way == "extended" else -1)))
        assert next((damage.start, damage.stop) for damage in report.damage) == tuple(ends)


def test_damage_is_placed_in_its_chunks_and_tensors(large: Path) -> None:
    """The third chunk is a short one. Two neighbours are one range."""
    path = large / ADAPTER
    length = path.stat().st_size
    assert 2 * CHUNK < length < 3 * CHUNK
    original = path.read_bytes()

    def ranges(*places: int) -> list[tuple[int | None, int | None, tuple[str, ...]]]:
        flipped = bytearray(original)
        for place in places:
            flipped[place] ^= 4
        path.write_bytes(flipped)
        try:
            return [(damage.start, damage.stop, damage.tensors) for damage in verify(large).damage]
        finally:
            path.write_bytes(original)

    with safetensors.safe_open(path, "numpy") as opened:
        assert set(opened.keys()) == {LORA, LARGE}
    header = 8 + int.from_bytes(original[:8], "little")
    first = {LORA: header, LARGE: header + 24}
    assert ranges() == []
    assert ranges(first[LORA]) == [(0, CHUNK, (LORA, LARGE))]
    assert ranges(CHUNK) == ranges(CHUNK * 2 - 1) == [(CHUNK, 2 * CHUNK, (LARGE,))]
    assert ranges(length - 1) == [(2 * CHUNK, length, (LARGE,))]
    assert ranges(5 * CHUNK // 4, length - 1) == [(CHUNK, length, (LARGE,))]
    assert ranges(first[LORA], length - 1) == [(0, CHUNK, (LORA, LARGE)), (2 * CHUNK, length, (LARGE,))]


def test_the_hashes_are_xxhash_of_the_bytes(large: Path) -> None:
    manifest = json.loads((large / "async_ckpt.json").read_text())
    data = (large / ADAPTER).read_bytes()
    assert manifest["files"][ADAPTER] == {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    chunks = [xxhash.xxh3_64_hexdigest(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK)]
    assert len(chunks) == 3
    assert manifest["chunks"] == {"bytes": CHUNK, "xxh3_64": {ADAPTER: chunks}}


def test_what_nobody_listed_is_told_and_is_no_damage(copied: Path) -> None:
    (copied / "training_state" / "notes.txt").write_text("mine")
    report = verify(copied)
    assert (report.damage, report.unlisted) == ([], ["training_state/notes.txt"])


def test_a_directory_under_another_step(copied: Path) -> None:
    moved = copied.rename(copied.with_name("checkpoint-4"))
    assert [str(damage) for damage in verify(moved).damage] == [
        "async_ckpt.json: is of step 3, in a directory of step 4"
    ]


@pytest.mark.parametrize(
    ("changes", "file", "said"),
    [
        ({"config": {"r": 2}}, CONFIG, "names no peft_type"),
        ({"config": [1]}, CONFIG, "holds a JSON list"),
        ({"tensors": {}}, CONFIG, "holds no tensor"),
        ({"tensors": {"w": adapter()[LORA]}}, CONFIG, "no tensor of adapter_model.safetensors has lora_"),
        ({"document": []}, DOCUMENT, "holds a JSON list"),
        ({"document": {"optimizers": {}}}, DOCUMENT, "is no training state: Expected `array`"),
        ({"state_tensors": state(("other.weight",))}, STATE, "'state.other.weight.exp_avg' belongs to no parameter"),
        ({"state_tensors": {"rng.rank1.python": state()["rng.rank0.python"]}}, STATE, "of a rank that 1 ranks"),
    ],
)
def test_what_was_committed_but_makes_no_sense(tmp_path: Path, changes: dict[str, Any], file: str, said: str) -> None:
    checkpoint = commit_checkpoint(tmp_path / "run", 1, tmp_path, **changes)
    found = verify(checkpoint).damage
    assert [damage.file for damage in found] == [file]
    assert said in found[0].what


def test_a_header_that_does_not_tile_its_file(tmp_path: Path) -> None:
    """As another program may have left it in the image: the hashes fit, the file is no safetensors file."""
    checkpoint = commit_checkpoint(tmp_path / "run", 1, tmp_path)
    image = tmp_path / "image-1" / ADAPTER
    image.write_bytes(image.read_bytes() + b"more")
    shutil.rmtree(checkpoint)
    from async_ckpt_saver.writer import CommitJob, commit

    commit(CommitJob(directory=str(tmp_path / "run"), step=1, image=str(tmp_path / "image-1"), files=(ADAPTER,)))
    assert ["its header describes" in damage.what for damage in verify(checkpoint).damage] == [True]
    assert read_manifest(checkpoint).step == 1


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        verify(tmp_path / "checkpoint-1")


def test_without_torch_and_numpy(sound: Path) -> None:
    code = ("import sys; sys.modules.update(torch=None, numpy=None, safetensors=None); "
            "from async_ckpt_saver.cli import main; sys.exit(main(['verify', sys.argv[1]]))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(sound.parent)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ok ")
    assert os.fspath(sound) in done.stdout


def test_what_is_being_verified_is_not_removed(copied: Path) -> None:
    """By retention or `gc`, which leave what a reader holds."""
    tries: list[bool] = []

    def try_to_remove(read_bytes: int) -> None:
        with pytest.raises(BeingRead), removing(copied):
            pass
        tries.append(True)

    assert verify(copied, try_to_remove).damage == []
    assert len(tries) > 0
    with removing(copied):
        pass


def test_a_manifest_without_a_hash_is_told_from_one_that_was_changed(copied: Path) -> None:
    manifest = copied / "async_ckpt.json"
    content = json.loads(manifest.read_text())
    del content["self_xxh3_128"]
    manifest.write_text(json.dumps(content))
    [damage] = verify(copied).damage
    assert "it has no hash of its own" in str(damage)


@pytest.mark.parametrize("forged", [{"bytes": 1}, {"bytes": 1, "xxh3_64": {}}, {"bytes": 2**60}])
def test_a_manifest_does_not_say_in_what_pieces_a_file_is_read(
    large: Path, tmp_path: Path, forged: dict[str, Any]
) -> None:
    """Each piece costs memory: hashes in the manifest, which is bounded, pay for them, or there are none."""
    copied = Path(shutil.copytree(large, tmp_path / "checkpoint-3"))
    manifest = json.loads((copied / "async_ckpt.json").read_bytes())
    manifest["chunks"] |= forged
    del manifest["self_xxh3_128"]
    (copied / "async_ckpt.json").write_bytes(encode_manifest(msgspec.convert(manifest, Manifest)))
    reads: list[int] = []
    assert verify(copied, reads.append).damage == []
    assert len(reads) < 20, "17 MB in pieces of 8 MiB"
    data = (copied / ADAPTER).read_bytes()
    (copied / ADAPTER).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (damage,) = verify(copied).damage
    assert (damage.file, damage.start, damage.stop) == (ADAPTER, 0, len(data))


def test_many_chunks_cost_their_hashes_and_no_more() -> None:
    digests = Digests(1)
    for start in range(1000):
        digests.update(memoryview(b"x"), start)
    assert digests.chunks == (xxhash.xxh3_64_hexdigest(b"x"),) * 1000
    assert digests.whole == xxhash.xxh3_128_hexdigest(b"x" * 1000)
    assert all(isinstance(each, str) for each in digests._done), "a hasher has half a kilobyte"
