"""What a registration has used for a moment goes back to the system: a saver lives beside trainers that need it."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return freed memory to the kernel, where the C library can (glibc); elsewhere it does so by itself, or never."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
