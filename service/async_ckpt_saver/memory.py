"""A saver lives beside trainers that need the memory, and is waited for when it starts."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
_LARGE_BYTES = 64 << 20


def one_heap() -> None:
    """Let all threads allocate from one heap (glibc): each of a dozen threads, most of them idle, would keep one of its
    own. To be called before there are threads."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """While a program is imported nothing becomes garbage, and afterwards none of it ever will."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def give_back() -> None:
    """Return freed memory to the kernel, such as a registration has used for a moment. Where the C library can (glibc);
    elsewhere it does so by itself, or never."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reuse_large_blocks() -> None:
    """Let malloc (glibc's) keep blocks of megabytes that come and go, until `give_back`. Else each message of a link is
    a mapping of its own, and its pages come from the kernel one fault at a time: a tenth of a second a gigabyte."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 4 * _LARGE_BYTES)
