"""A file of a checkpoint that several hosts write, each its own bytes of it.

Whoever goes past the page cache writes whole blocks, and whoever goes through it whole pages. So only blocks that are
one host's alone go past it; the others, at the borders, are left to the filesystem, which has to keep them coherent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

import xxhash

from async_ckpt.core.errors import CheckpointError

from .datafile import ALIGN_BYTES, NOT_DIRECT, open_below, open_source
from .write_behind import PIECE_BYTES, WriteBehind

# On some machines a page is larger than a block.
BLOCK_BYTES = max(ALIGN_BYTES, mmap.PAGESIZE)
# Below this the direct path saves nothing.
_DIRECT_LEAST_BYTES = 256 << 10
_NO_FALLOCATE = frozenset({errno.ENOSYS, errno.EOPNOTSUPP})


def make_file(path: str, size_bytes: int) -> None:
    """A new file of that size, with its space reserved where the filesystem can do that: a full one is found out before
    anybody writes. Raises OSError, also if it is there."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            _fallocate(fd, size_bytes)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise OSError(error.errno, error.strerror, path) from None
            os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)


def _fallocate(fd: int, size_bytes: int) -> None:
    """Python's own writes a byte into each block where the filesystem has no such call. Raises OSError."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class PartFile:
    """The file `path` below `directory`, which is there and has `size_bytes`. `direct` turns False if O_DIRECT is
    refused. Raises OSError, and CheckpointError if it is another file than was made."""

    def __init__(self, directory: str, path: str, size_bytes: int) -> None:
        self.direct = True
        self._name = os.path.join(directory, path)
        self._bypass: int | None = None
        self._fd = open_below(directory, path, os.O_WRONLY)
        try:
            info = os.fstat(self._fd)
            if not stat.S_ISREG(info.st_mode) or info.st_size != size_bytes:
                raise CheckpointError(f"{self._name} has {info.st_size} bytes here, and was made with {size_bytes}: "
                                      f"this filesystem does not show each host what the others write")  # fmt: skip
            self._behind: WriteBehind | None = None
            try:
                self._bypass = open_below(directory, path, os.O_WRONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno not in NOT_DIRECT:
                    raise
                self._refused()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in (self._fd, self._bypass):
            if fd is not None:
                os.close(fd)

    def write(self, data: memoryview, start: int) -> None:
        """All of `data` at `start`, and not a byte beside it. It lies in a mapping, as far from the beginning of a page
        as `start` does."""
        first = -(-start // BLOCK_BYTES) * BLOCK_BYTES
        last = (start + len(data)) // BLOCK_BYTES * BLOCK_BYTES
        if self._bypass is None or last - first < _DIRECT_LEAST_BYTES:
            self._through_cache(data, start)
            return
        self._through_cache(data[: first - start], start)
        done = self._past_cache(data[first - start : last - start], first)
        self._through_cache(data[first - start + done :], first + done)

    def sync(self) -> None:
        """Make what was written durable. After an OSError here nothing is known of it."""
        os.fdatasync(self._fd)

    def _past_cache(self, data: memoryview, start: int) -> int:
        """How many bytes of it were written so, before the filesystem refused, or ended within a block."""
        done = 0
        while done < len(data) and done % BLOCK_BYTES == 0:
            try:
                done += self._counted(os.pwrite(self._bypass or 0, data[done:], start + done))
            except OSError as error:
                if error.errno not in NOT_DIRECT:
                    raise OSError(error.errno, error.strerror, self._name) from None
                self._refused()
                break
        return done

    def _through_cache(self, data: memoryview, start: int) -> None:
        done = 0
        while done < len(data):
            most = len(data) if self._behind is None else done + PIECE_BYTES
            try:
                written = self._counted(os.pwrite(self._fd, data[done:most], start + done))
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._name) from None
            if self._behind is not None:
                self._behind.wrote(start + done, written)
            done += written

    def _counted(self, written: int) -> int:
        if written == 0:
            raise OSError(errno.EIO, "the filesystem accepts no more bytes", self._name)
        return written

    def _refused(self) -> None:
        if self._bypass is not None:
            os.close(self._bypass)
        self._bypass, self.direct = None, False
        self._behind = WriteBehind(self._fd)


@contextlib.contextmanager
def mapped_source(image: str, path: str) -> Iterator[memoryview]:
    """The image's file `path`, of which no more is looked at than is read. Raises OSError, CheckpointError."""
    source = open_source(image, path)
    try:
        mapping = mmap.mmap(source, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(source)
    try:
        with memoryview(mapping) as view:
            yield view
    finally:
        with contextlib.suppress(BufferError):  # the traceback of a failed write holds views
            mapping.close()


def write_pieces(
    source: memoryview, file: PartFile, pieces: Sequence[tuple[int, int]], hashing: Executor,
    before_piece: Callable[[], None],
) -> list[int]:  # fmt: skip
    """Bytes [start, stop) of each piece go from `source` to where they belong in `file`; returns their xxh3-64, over
    exactly what was handed to the kernel. `before_piece` ends it by raising."""
    hashes = []
    for start, stop in pieces:
        before_piece()
        with source[start:stop] as data:
            hashed = hashing.submit(xxhash.xxh3_64_intdigest, data)
            try:
                file.write(data, start)
            finally:
                hashes.append(hashed.result())
    return hashes
