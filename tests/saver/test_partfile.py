"""Several processes that write ranges of one file: to the byte, by O_DIRECT or not, and never a byte beside them."""

from __future__ import annotations

import errno
import itertools
import mmap
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from async_ckpt.core.errors import CheckpointError
from async_ckpt_saver.partfile import BLOCK_BYTES, PartFile, make_file, mapped_source, write_pieces

MIB = 1 << 20
SIZE = 6 * MIB + 12_345


@pytest.fixture(params=["disk", "tmpfs"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    directory = Path("/dev/shm") / f"async-ckpt-test-part-{os.getpid()}"
    directory.mkdir()
    yield directory
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def write(directory: str, image: str, pieces: list[tuple[int, int]]) -> list[int]:
    with (
        ThreadPoolExecutor(1) as hashing,
        mapped_source(image, "source") as source,
        PartFile(directory, "target", len(source)) as file,
    ):
        hashes = write_pieces(source, file, pieces, hashing, lambda: None)
        file.sync()
        return hashes


BORDERS = [1, 4095, 4096, 4097, MIB + 17, 2 * MIB, 2 * MIB + 1, 4 * MIB - 1, SIZE - 1]


def test_pieces_of_two_hosts_make_up_the_file(storage: Path, tmp_path: Path) -> None:
    """Two processes at once, every other piece each, with borders anywhere in a block."""
    data = os.urandom(SIZE)
    (tmp_path / "source").write_bytes(data)
    make_file(str(storage / "target"), SIZE)
    edges = [0, *BORDERS, SIZE]
    pieces = list(itertools.pairwise(edges))
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        parts = [(str(storage), str(tmp_path), pieces[turn::2]) for turn in (0, 1)]
        hashes = pool.starmap(write, parts)
    assert (storage / "target").read_bytes() == data
    for turn in (0, 1):
        assert hashes[turn] == [xxhash.xxh3_64_intdigest(data[start:stop]) for start, stop in pieces[turn::2]]


def test_what_lies_beside_a_piece_is_not_touched(storage: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(SIZE))
    (storage / "target").write_bytes(b"\xff" * SIZE)
    write(str(storage), str(tmp_path), [(3, MIB + 5), (2 * MIB - 1, 4 * MIB + 1)])
    found = (storage / "target").read_bytes()
    zeros = [*range(3, MIB + 5), *range(2 * MIB - 1, 4 * MIB + 1)]
    assert all(found[at] == 0 for at in zeros)
    assert found.count(0) == len(zeros)


def test_whole_blocks_bypass_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(bytes(SIZE))
    make_file(str(tmp_path / "target"), SIZE)
    seen: list[tuple[bool, int, int]] = []
    real = os.pwrite

    def spy(fd: int, data: memoryview, offset: int) -> int:
        flags = int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
        seen.append((bool(flags & os.O_DIRECT), offset, len(data)))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", spy)
    write(str(tmp_path), str(tmp_path), [(100, 3 * MIB + 100)])
    assert seen == [
        (False, 100, BLOCK_BYTES - 100),
        (True, BLOCK_BYTES, 3 * MIB - BLOCK_BYTES),
        (False, 3 * MIB, 100),
    ]
    assert mmap.PAGESIZE <= BLOCK_BYTES


@pytest.mark.parametrize("where", ["open", "write"])
def test_where_o_direct_is_refused_it_goes_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    data = os.urandom(SIZE)
    (tmp_path / "source").write_bytes(data)
    make_file(str(tmp_path / "target"), SIZE)
    real_open, real_write = os.open, os.pwrite

    def refuse_open(path: str, flags: int, *rest: int, **names: int) -> int:
        if flags & os.O_DIRECT == os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, "no")
        return real_open(path, flags, *rest, **names)

    def refuse_write(fd: int, part: memoryview, offset: int) -> int:
        flags = int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
        if flags & os.O_DIRECT and where == "write":
            raise OSError(errno.EINVAL, "no")
        return real_write(fd, part, offset)

    monkeypatch.setattr(os, "open", refuse_open)
    monkeypatch.setattr(os, "pwrite", refuse_write)
    write(str(tmp_path), str(tmp_path), [(0, 3 * MIB + 7), (3 * MIB + 7, SIZE)])
    monkeypatch.undo()
    assert (tmp_path / "target").read_bytes() == data


def test_a_file_is_made_once_at_its_full_size_and_opened_only_if_it_is_that(tmp_path: Path) -> None:
    path = tmp_path / "target"
    make_file(str(path), SIZE)
    assert path.stat().st_size == SIZE
    assert path.stat().st_blocks * 512 >= SIZE, "a full disk is found out now"
    with pytest.raises(FileExistsError):
        make_file(str(path), SIZE)
    with pytest.raises(CheckpointError, match="was made with"):
        PartFile(str(tmp_path), "target", SIZE + 1)
    with pytest.raises(FileNotFoundError, match="nothing"):
        PartFile(str(tmp_path), "nothing", SIZE)
    assert sorted(os.listdir(tmp_path)) == ["target"]


@pytest.mark.parametrize("name", ["link", "folder/target"])
def test_no_symbolic_link_is_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    outside = tmp_path / "elsewhere/target"
    outside.write_bytes(b"mine")
    inside = tmp_path / "inside"
    inside.mkdir()
    if name == "link":
        (inside / name).symlink_to(outside)
    else:
        (inside / "folder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
        PartFile(str(inside), name, 4)
    assert outside.read_bytes() == b"mine"
