"""A saver lives beside trainers that need the memory, and is waited for when it starts."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

_M_ARENA_MAX = -8  # of mallopt(3)


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
