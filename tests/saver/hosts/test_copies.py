"""A copy of a checkpoint in shared memory, as it is made and read: what is not whole, or is another, is none."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import xxhash

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.images import image_bytes
from async_ckpt.core.manifest import FORMAT, MANIFEST_NAME, FileEntry, Manifest, encode_manifest
from async_ckpt.core.protocol import ImageFile, Layout
from async_ckpt.core.slots import copy_paths
from async_ckpt_saver.hosts.copies import Copying, Source, digest_of, find_copies, folder_source, require_room
from async_ckpt_saver.hosts.link_words import MAX_COPY_PIECE_BYTES

DIRECTORY = "/runs/a"
FILES = {
    "adapter_model.safetensors": secrets.token_bytes(2 * MAX_COPY_PIECE_BYTES + 5),
    "empty.json": b"",
    "training_state/rank-0.json": b"{}",
}


def manifest(files: dict[str, bytes], step: int = 7) -> bytes:
    entries = {path: FileEntry(len(data), xxhash.xxh3_128_hexdigest(data)) for path, data in files.items()}
    return encode_manifest(Manifest(format=FORMAT, step=step, metrics={}, extra=None, files=entries))


def source(files: dict[str, bytes], folder: Path) -> Source:
    """The first file in a folder, the others as documents."""
    first, *others = files
    (folder / first).write_bytes(files[first])
    return Source(manifest(files), folder, {path: files[path] for path in others}, lambda: True)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    name = f"ipc://{tmp_path}/saver.sock"
    yield name
    for copy in find_copies(name):
        copy.remove()
    assert copy_paths(name) == []


def fill(copying: Copying, source: Source) -> int:
    """How many pieces it took."""
    count = 0
    while (number := copying.next_number(1)) is not None:
        data = source.read(number)
        assert data is not None
        assert copying.take(number, data)
        count += 1
    return count


def test_a_copy_is_the_checkpoint_byte_for_byte_and_is_found_again(tmp_path: Path, endpoint: str) -> None:
    origin = source(FILES, tmp_path)
    copying = Copying.begin(endpoint, DIRECTORY, origin.manifest)
    assert fill(copying, origin) == 3
    assert copying.complete
    made = copying.finish()
    (found,) = find_copies(endpoint)
    assert (found.record, found.path) == (made.record, made.path)
    assert (found.record.directory, found.record.step, found.record.digest) == (
        DIRECTORY,
        7,
        digest_of(origin.manifest),
    )
    assert found.damage() == ""
    there = {path.relative_to(found.checkpoint).as_posix(): path.read_bytes()
             for path in found.checkpoint.rglob("*") if path.is_file()}  # fmt: skip
    assert there == {**FILES, MANIFEST_NAME: origin.manifest}
    again = folder_source(found.checkpoint)
    assert again.digest == origin.digest
    assert [again.read(number) for number in range(3)] == [origin.read(number) for number in range(3)]
    assert found.allocated_bytes() >= sum(map(len, FILES.values()))
    found.remove()
    assert again.read(0) is None
    assert not again.there


def test_what_does_not_come_next_changes_nothing(tmp_path: Path, endpoint: str) -> None:
    origin = source(FILES, tmp_path)
    copying = Copying.begin(endpoint, DIRECTORY, origin.manifest)
    pieces = [origin.read(number) or b"" for number in range(3)]
    assert not copying.take(0, pieces[0])  # nobody asked for it
    assert [copying.next_number(2) for _ in range(3)] == [0, 1, None]
    assert not copying.take(1, pieces[1])
    assert not copying.take(0, pieces[0][:-1])
    assert copying.take(0, pieces[0])
    assert not copying.take(0, pieces[0])
    copying.ask_again()
    assert [copying.next_number(2) for _ in range(3)] == [1, 2, None]
    assert copying.take(1, pieces[1])
    assert not copying.complete
    assert copying.take(2, pieces[2])
    assert copying.finish().damage() == ""


@pytest.mark.parametrize("path", [*FILES][::2])
def test_a_file_that_is_not_what_the_manifest_says_makes_no_copy(tmp_path: Path, endpoint: str, path: str) -> None:
    other = {**FILES, path: FILES[path][:-1] + bytes([FILES[path][-1] ^ 1])}
    copying = Copying.begin(endpoint, DIRECTORY, manifest(FILES))
    fill(copying, source(other, tmp_path))
    with pytest.raises(CheckpointError, match=path):
        copying.finish()
    copying.abandon()
    assert copy_paths(endpoint) == []


def test_damage_in_memory_is_found(tmp_path: Path, endpoint: str) -> None:
    origin = source(FILES, tmp_path)
    copying = Copying.begin(endpoint, DIRECTORY, origin.manifest)
    fill(copying, origin)
    copy = copying.finish()
    with (copy.checkpoint / "training_state/rank-0.json").open("r+b") as file:
        file.write(b"[")
    assert "rank-0.json does not hash" in copy.damage()
    (copy.checkpoint / MANIFEST_NAME).write_bytes(manifest(FILES, step=8))
    assert MANIFEST_NAME in copy.damage()
    (copy.checkpoint / MANIFEST_NAME).unlink()
    assert copy.damage() != ""


def test_what_a_killed_saver_did_not_finish_is_no_copy_and_goes(tmp_path: Path, endpoint: str) -> None:
    origin = source(FILES, tmp_path)
    fill(Copying.begin(endpoint, DIRECTORY, origin.manifest), origin)
    assert len(copy_paths(endpoint)) == 1
    assert find_copies(endpoint) == []
    assert copy_paths(endpoint) == []


def test_without_room_there_is_no_copy_and_the_bytes_are_named(endpoint: str) -> None:
    large = Manifest(format=FORMAT, step=1, metrics={}, extra=None, files={"a": FileEntry(1 << 50, "0" * 32)})
    with pytest.raises(CheckpointError, match=f"it needs {1 << 50} bytes"):
        Copying.begin(endpoint, DIRECTORY, encode_manifest(large))
    assert copy_paths(endpoint) == []
    layout = Layout((ImageFile("a", b"", 1 << 50),), {})
    with pytest.raises(CheckpointError, match=f"which needs {2 << 50}: "):
        require_room(layout, 0)
    require_room(layout, 2 * image_bytes(layout))


def test_a_manifest_that_was_changed_on_its_way_is_refused(endpoint: str) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        Copying.begin(endpoint, DIRECTORY, manifest(FILES).replace(b'"step": 7', b'"step": 8'))
    assert copy_paths(endpoint) == []


def test_a_slot_is_read_only_while_it_holds_the_step(tmp_path: Path) -> None:
    answers = iter([True, True, True, False, False])
    first = next(iter(FILES))
    (tmp_path / first).write_bytes(FILES[first])
    slot = Source(manifest(FILES), tmp_path, {path: FILES[path] for path in [*FILES][1:]}, lambda: next(answers))
    assert slot.read(0) == FILES[first][:MAX_COPY_PIECE_BYTES]
    assert slot.read(0) is None  # it was taken while it was read
    assert slot.read(0) is None
    with pytest.raises(IndexError):
        slot.read(3)

    def removed() -> bool:
        raise ValueError("mmap closed or invalid")

    gone = Source(manifest(FILES), tmp_path, {}, removed)
    assert not gone.there
    assert gone.read(0) is None


def test_a_record_of_another_kind_is_none(tmp_path: Path, endpoint: str) -> None:
    origin = source(FILES, tmp_path)
    copying = Copying.begin(endpoint, DIRECTORY, origin.manifest)
    fill(copying, origin)
    copy = copying.finish()
    (copy.path / "copy.msgpack").write_bytes(msgspec.msgpack.encode({"directory": 5}))
    assert find_copies(endpoint) == []
