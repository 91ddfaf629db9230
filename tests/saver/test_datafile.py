from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from async_ckpt_saver.datafile import ALIGN_BYTES, CHUNK_BYTES, DIRECT_MIN_BYTES, Written, write_image_file
from async_ckpt_saver.write_behind import PIECE_BYTES
from async_ckpt_saver.writer import CommitError, CommitJob, commit

Pwrite = Callable[[int, memoryview, int], int]
LENGTHS = [
    0, 1, ALIGN_BYTES - 1, ALIGN_BYTES, ALIGN_BYTES + 1, DIRECT_MIN_BYTES - 1, DIRECT_MIN_BYTES, DIRECT_MIN_BYTES + 1,
    CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, CHUNK_BYTES + ALIGN_BYTES, 2 * CHUNK_BYTES + 3 * ALIGN_BYTES + 5,
]  # fmt: skip


@pytest.fixture
def hashing() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(params=["disk", "tmpfs"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    directory = Path("/dev/shm") / f"async-ckpt-test-{os.getpid()}"
    directory.mkdir()
    yield directory
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def image_of(directory: Path, length: int) -> bytes:
    block = os.urandom(4096)
    data = b"".join(number.to_bytes(8, "little") + block[8:] for number in range(length // 4096 + 1))[:length]
    (directory / "source").write_bytes(data)
    return data


def copy(directory: Path, hashing: ThreadPoolExecutor) -> Written:
    target = str(directory / "target")
    return write_image_file(str(directory), "source", target, hashing, lambda name: None)


def assert_copied(directory: Path, data: bytes, written: Written) -> None:
    assert (directory / "target").read_bytes() == data
    assert (written.entry.bytes, written.entry.xxh3_128) == (len(data), xxhash.xxh3_128_hexdigest(data))


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_arrives_to_the_byte(storage: Path, length: int, hashing: ThreadPoolExecutor) -> None:
    data = image_of(storage, length)
    written = copy(storage, hashing)
    assert_copied(storage, data, written)
    assert (written.direct is None) == (length < DIRECT_MIN_BYTES)


def test_an_existing_file_is_not_overwritten(tmp_path: Path, hashing: ThreadPoolExecutor) -> None:
    image_of(tmp_path, 5)
    (tmp_path / "target").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        copy(tmp_path, hashing)
    assert (tmp_path / "target").read_bytes() == b"mine"


def is_direct(fd: int) -> bool:
    with open(f"/proc/self/fdinfo/{fd}") as info:
        flags = next(line.split()[1] for line in info if line.startswith("flags"))
    return bool(int(flags, 8) & os.O_DIRECT)


def intercept(monkeypatch: pytest.MonkeyPatch, replacement: Callable[[Pwrite, int, memoryview, int], int]) -> None:
    pwrite: Pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: replacement(pwrite, fd, data, offset))


def test_whole_blocks_bypass_the_page_cache_and_the_tail_does_not(
    tmp_path: Path, hashing: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(pwrite: Pwrite, fd: int, data: memoryview, offset: int) -> int:
        calls.append((is_direct(fd), offset, len(data)))
        return pwrite(fd, data, offset)

    intercept(monkeypatch, record)
    data = image_of(tmp_path, CHUNK_BYTES + ALIGN_BYTES + 7)
    written = copy(tmp_path, hashing)
    assert_copied(tmp_path, data, written)
    if not _has_direct(tmp_path):
        pytest.skip("the temporary directory's filesystem has no O_DIRECT")
    assert written.direct
    assert calls == [
        (True, 0, CHUNK_BYTES),
        (True, CHUNK_BYTES, ALIGN_BYTES),
        (False, CHUNK_BYTES + ALIGN_BYTES, 7),
    ]


def refuse_direct_opens(monkeypatch: pytest.MonkeyPatch, *, leaves_file: bool = False) -> None:
    really_open = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_DIRECT:
            if leaves_file:
                os.close(really_open(path, flags & ~os.O_DIRECT, mode, dir_fd=dir_fd))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return really_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("leaves_file", [False, True])
def test_o_direct_refused_at_open(
    tmp_path: Path, hashing: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, leaves_file: bool
) -> None:
    refuse_direct_opens(monkeypatch, leaves_file=leaves_file)
    data = image_of(tmp_path, CHUNK_BYTES + 5)
    written = copy(tmp_path, hashing)
    assert_copied(tmp_path, data, written)
    assert written.direct is False


@pytest.mark.parametrize("refused_call", [0, 1, 2])
def test_o_direct_refused_at_a_write(
    tmp_path: Path, hashing: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, refused_call: int
) -> None:
    calls: list[bool] = []

    def refuse(pwrite: Pwrite, fd: int, data: memoryview, offset: int) -> int:
        calls.append(is_direct(fd))
        if len(calls) - 1 == refused_call:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(fd, data, offset)

    if not _has_direct(tmp_path):
        pytest.skip("the temporary directory's filesystem has no O_DIRECT")
    intercept(monkeypatch, refuse)
    data = image_of(tmp_path, 3 * CHUNK_BYTES + 5)
    written = copy(tmp_path, hashing)
    assert_copied(tmp_path, data, written)
    assert written.direct is False
    pieces = (3 - refused_call) * CHUNK_BYTES // PIECE_BYTES + 1
    assert calls == [True] * (refused_call + 1) + [False] * pieces


def _has_direct(directory: Path) -> bool:
    try:
        fd = os.open(directory / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        # Not os.pwrite, which the tests replace.
        return os.pwritev(fd, [mmap.mmap(-1, ALIGN_BYTES)], 0) == ALIGN_BYTES
    except OSError:
        return False
    finally:
        os.close(fd)


def test_einval_of_a_buffered_write_is_an_error(
    tmp_path: Path, hashing: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pwrite: Pwrite, fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    intercept(monkeypatch, refuse)
    image_of(tmp_path, DIRECT_MIN_BYTES)
    with pytest.raises(OSError, match="Invalid argument"):
        copy(tmp_path, hashing)


@pytest.mark.parametrize("at_most", [ALIGN_BYTES * 100, 999_983])
def test_short_writes_are_carried_on(
    tmp_path: Path, hashing: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    """999 983 is prime: the rest of a chunk then has no aligned start."""

    def shorten(pwrite: Pwrite, fd: int, data: memoryview, offset: int) -> int:
        if is_direct(fd) and at_most % ALIGN_BYTES:
            # What a filesystem does that runs full inside a block.
            os.pwritev(fd, [mmap.mmap(-1, ALIGN_BYTES)], offset)
            with open(f"/proc/self/fd/{fd}", "r+b") as file:
                return pwrite(file.fileno(), data[:at_most], offset)
        return pwrite(fd, data[:at_most], offset)

    intercept(monkeypatch, shorten)
    data = image_of(tmp_path, 2 * CHUNK_BYTES + 5)
    written = copy(tmp_path, hashing)
    assert_copied(tmp_path, data, written)
    # It was not refused: a short write is none of the filesystem's dislikes of O_DIRECT.
    assert written.direct == _has_direct(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("failing_call", [0, 1, 2])
def test_a_write_that_fails_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, failing_call: int
) -> None:
    calls = 0

    def fail(pwrite: Pwrite, fd: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls - 1 == failing_call:
            raise OSError(code, os.strerror(code))
        return pwrite(fd, data[: len(data) // 2] if len(data) > ALIGN_BYTES else data, offset)

    image_of(tmp_path, DIRECT_MIN_BYTES + 5)
    intercept(monkeypatch, fail)
    with pytest.raises(CommitError, match=os.strerror(code)) as caught:
        commit(CommitJob(str(tmp_path / "run"), 1, str(tmp_path), ("source",)))
    assert caught.value.errno == code
    assert os.listdir(tmp_path / "run") == []


def test_a_filesystem_that_takes_no_more_bytes_ends_the_loop(
    tmp_path: Path, hashing: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    intercept(monkeypatch, lambda pwrite, fd, data, offset: 0)
    image_of(tmp_path, 100)
    with pytest.raises(OSError, match="no more bytes"):
        copy(tmp_path, hashing)


def test_a_file_size_limit_is_a_commit_error_not_a_death(tmp_path: Path) -> None:
    """A real short write: the kernel takes what is below the limit, then says EFBIG."""
    program = (
        "import resource, sys; from async_ckpt_saver.writer import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_001, 3_000_001))\n"
        "try: commit(CommitJob(sys.argv[1] + '/run', 1, sys.argv[1], ('source',)))\n"
        "except CommitError as error: print(error.errno)\n"
    )
    image_of(tmp_path, CHUNK_BYTES)
    assert _python(program, tmp_path) == str(errno.EFBIG)
    assert os.listdir(tmp_path / "run") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", directory], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting needs root")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_full_disk_fails_the_commit_and_the_next_one_works(tmp_path: Path, small_disk: Path) -> None:
    image_of(tmp_path, 3 << 20)
    run = small_disk / "run"
    commit(CommitJob(str(run), 1, str(tmp_path), ("source",)))
    for step in (2, 3):
        with pytest.raises(CommitError, match="No space left"):
            commit(CommitJob(str(run), step, str(tmp_path), ("source",)))
        assert sorted(os.listdir(run)) == ["checkpoint-1", "latest"]
    image_of(tmp_path, 100_000)
    commit(CommitJob(str(run), 4, str(tmp_path), ("source",)))
    assert os.readlink(run / "latest") == "checkpoint-4"


@pytest.mark.parametrize("direct", [True, False])
def test_private_memory_is_bounded(
    tmp_path: Path, hashing: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    if not direct:
        refuse_direct_opens(monkeypatch)
    length = 64 << 20
    with open(tmp_path / "source", "wb") as file:
        file.truncate(length)
    before, seen = _private_bytes(), []
    target = str(tmp_path / "target")
    write_image_file(str(tmp_path), "source", target, hashing, lambda name: seen.append(_private_bytes()))
    assert len(seen) == length // CHUNK_BYTES + 1
    assert max(seen) - before < CHUNK_BYTES


def _private_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_the_saver_side_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    program = (
        "import sys, async_ckpt_saver.writer, async_ckpt_saver.retention\n"
        "print(sorted({'torch', 'numpy', 'pickle'} & set(sys.modules)))"
    )
    assert _python(program, tmp_path) == "[]"


def _python(program: str, directory: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(directory)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()
