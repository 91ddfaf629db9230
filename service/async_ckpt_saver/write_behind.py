"""Writing through the page cache, at the price of a few of its pages.

Left to itself the kernel keeps a page for every byte written: it takes each of them from free memory, which costs more
than the copy into it (on a virtual machine ten times more, the first time), starts to write late, and throws away what
somebody else may still need. Here the device gets its work at once, and pages go back as soon as they are clean, so the
same few are used again and again.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from typing import Any

# Pieces of 2 MiB, two of them under way while the next is copied: larger pieces or more of them fall out of the CPU's
# caches, smaller ones cost more calls (docs/benchmarks.md).
PIECE_BYTES = 2 << 20
_UNDER_WAY = 2

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # of sync_file_range(2)
# What kernels, filesystems and sandboxes answer that do not have it.
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE, errno.EPERM})


class WriteBehind:
    """Sends what was written to `fd` on its way; what is clean leaves the page cache. Makes nothing durable: sizes and
    block maps are not synced, so `fdatasync` still has to follow.

    An OSError from `wrote` is final like one from fsync: the kernel reports a failed write of a page once.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._under_way: deque[tuple[int, int]] = deque()
        self._works = True

    def wrote(self, offset: int, length: int) -> None:
        """`length` bytes at `offset` have just been written to the file. Raises OSError if writing back failed."""
        if not self._works:
            return
        try:
            sync_file_range(self._fd, offset, length, _WRITE)
            self._under_way.append((offset, length))
            if len(self._under_way) > _UNDER_WAY:
                first = self._under_way.popleft()
                sync_file_range(self._fd, *first, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
                os.posix_fadvise(self._fd, *first, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self._works = False


def sync_file_range(fd: int, offset: int, length: int, flags: int) -> None:
    """Python has no binding for it. Raises OSError, ENOSYS where the C library has none either."""
    call: Any = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(fd, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(flags)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
