"""Bytes of one file at a time, of this host or in an object store, wherever in it they lie."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Protocol

from .location import Location, Url


class Ranges(Protocol):
    """An open file of `bytes` bytes. `read` gives fewer than asked for only at its end, and raises OSError, or
    ObjectError where it is in a store."""

    bytes: int

    def read(self, start: int, stop: int) -> memoryview: ...


class _LocalRanges:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.bytes = os.fstat(fd).st_size

    def read(self, start: int, stop: int) -> memoryview:
        found = bytearray()
        while start + len(found) < stop:
            data = os.pread(self._fd, stop - start - len(found), start + len(found))
            if not data:
                break
            found += data
        return memoryview(found)


class _RemoteRanges:
    def __init__(self, url: Url) -> None:
        from .objects import Objects

        self._objects, self._key = Objects(url), url.key
        about = self._objects.stat(url.key)
        if about is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(url))
        self.bytes = about.bytes

    def read(self, start: int, stop: int) -> memoryview:
        return self._objects.read_range(self._key, start, min(stop, self.bytes))


@contextlib.contextmanager
def open_ranges(location: Location) -> Iterator[Ranges]:
    """Raises OSError if it cannot be opened, or is not a regular file."""
    if isinstance(location, Url):
        yield _RemoteRanges(location)
        return
    fd = os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(location))
        yield _LocalRanges(fd)
    finally:
        os.close(fd)
