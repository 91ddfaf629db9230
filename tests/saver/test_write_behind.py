"""The way through the page cache: what it leaves there, and what becomes of an error that only writing back finds."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from async_ckpt_saver import write_behind
from async_ckpt_saver.datafile import CHUNK_BYTES, write_image_file
from async_ckpt_saver.write_behind import PIECE_BYTES
from async_ckpt_saver.writer import CommitError, CommitJob, commit
from tests.saver.test_datafile import refuse_direct_opens

_LENGTH = 4 * CHUNK_BYTES + 5
_PIECES = 4 * CHUNK_BYTES // PIECE_BYTES + 1


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with one file of _LENGTH bytes, on a filesystem that refuses O_DIRECT."""
    refuse_direct_opens(monkeypatch)
    (tmp_path / "source").write_bytes(os.urandom(1 << 20) * (_LENGTH >> 20) + b"rest!")
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Offset, length and flags of each sync_file_range, which is still made."""
    calls = []
    real = write_behind.sync_file_range

    def record(fd: int, offset: int, length: int, flags: int) -> None:
        calls.append((offset, length, flags))
        real(fd, offset, length, flags)

    monkeypatch.setattr(write_behind, "sync_file_range", record)
    return calls


def answering(monkeypatch: pytest.MonkeyPatch, code: int, *, from_call: int = 0) -> list[int]:
    """Every sync_file_range fails from that one on; returns the flags of those that were made."""
    made: list[int] = []

    def fail(fd: int, offset: int, length: int, flags: int) -> None:
        made.append(flags)
        if len(made) > from_call:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(write_behind, "sync_file_range", fail)
    return made


def write(image: Path) -> Path:
    with ThreadPoolExecutor(1) as hashing:
        written = write_image_file(str(image), "source", str(image / "target"), hashing, lambda name: None)
    assert written.direct is False
    assert (image / "target").read_bytes() == (image / "source").read_bytes()
    return image / "target"


def cached_pages(path: Path) -> int:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages) == 0
        del start
        return sum(page & 1 for page in pages)


def lives_in_memory(directory: Path) -> bool:
    with (directory / "probe").open("wb") as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_pages(directory / "probe") > 0


def test_each_piece_is_sent_on_its_way_and_waited_for_two_pieces_later(
    image: Path, asked: list[tuple[int, int, int]]
) -> None:
    write(image)
    started = [offset for offset, _, flags in asked if flags == write_behind._WRITE]
    waited = [offset for offset, _, flags in asked if flags != write_behind._WRITE]
    assert started == [number * PIECE_BYTES for number in range(_PIECES)]
    assert waited == started[:-2]


def test_few_pages_stay_in_the_page_cache(image: Path) -> None:
    if lives_in_memory(image):
        pytest.skip("the temporary directory is in memory: its pages are all that there is of a file")
    seen: list[int] = []
    with ThreadPoolExecutor(1) as hashing:
        write_image_file(str(image), "source", str(image / "target"), hashing,
                         lambda name: seen.append(cached_pages(image / "target") if seen else 0))  # fmt: skip
    assert max(seen) <= 3 * PIECE_BYTES // mmap.PAGESIZE
    assert len(seen) == 4 + 1 + 1  # chunks, the tail, the sync


def test_an_error_of_writing_back_fails_the_save_and_nothing_is_synced_after_it(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells it once: an fsync that followed could succeed."""
    made = answering(monkeypatch, errno.EIO, from_call=5)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    with pytest.raises(CommitError, match=os.strerror(errno.EIO)) as caught:
        commit(CommitJob(str(image / "run"), 1, str(image), ("source",)))
    assert caught.value.errno == errno.EIO
    assert (len(made), synced, os.listdir(image / "run")) == (6, [], [])


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EPERM])
def test_where_the_call_is_missing_the_file_is_written_without_it(
    image: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    made = answering(monkeypatch, code)
    write(image)
    assert made == [write_behind._WRITE], "asked once a file"


def test_a_file_written_by_o_direct_needs_none(tmp_path: Path, asked: list[tuple[int, int, int]]) -> None:
    (tmp_path / "source").write_bytes(b"x" * (CHUNK_BYTES + 5))
    with ThreadPoolExecutor(1) as hashing:
        written = write_image_file(str(tmp_path), "source", str(tmp_path / "target"), hashing, lambda name: None)
    assert (asked == []) == (written.direct is True)
