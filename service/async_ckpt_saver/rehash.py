"""A file of a checkpoint, opened to be hashed again as it lies in storage."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import Protocol

from async_ckpt.core.location import Location, Url

from .datafile import CHUNK_BYTES, Digests

Progress = Callable[[int], None]


class NotAFile(Exception):
    """It cannot be opened, or is something else; the text says what."""


class Rehashed(Protocol):
    """An open file of `bytes` bytes."""

    bytes: int

    def digest(self, digests: Digests, progress: Progress) -> None:
        """Give it all of the file; `progress` is told of every read. Raises OSError, or ObjectError where it is in a
        store."""


@contextlib.contextmanager
def opened(location: Location) -> Iterator[Rehashed]:
    """Raises NotAFile."""
    if isinstance(location, Url):
        yield _Remote(location)
        return
    try:
        fd = os.open(location, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NotAFile(f"cannot be opened: {error.strerror or error}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NotAFile("is not a regular file")
        yield _Local(fd)
    finally:
        os.close(fd)


class _Local:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.bytes = os.fstat(fd).st_size

    def digest(self, digests: Digests, progress: Progress) -> None:
        """The bytes come from the disk, not from a page cache that may be better than it."""
        fd = self._fd
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        position = 0
        with memoryview(bytearray(min(CHUNK_BYTES, max(self.bytes, 1)))) as view:
            while position < self.bytes:
                count = os.preadv(fd, [view], position)
                if count == 0:
                    break  # it has become shorter since its size was looked at: the hash will not fit
                digests.update(view[:count], position)
                position += count
                progress(count)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


class _Remote:
    def __init__(self, url: Url) -> None:
        from async_ckpt.core.objects import Objects

        self._objects, self._key = Objects(url), url.key
        about = self._objects.stat(url.key)
        if about is None:
            raise NotAFile("cannot be opened: there is no such object")
        self.bytes = about.bytes

    def digest(self, digests: Digests, progress: Progress) -> None:
        for start, data in self._objects.read_ranges(self._key, [(0, self.bytes)]):
            digests.update(data, start)
            progress(len(data))
