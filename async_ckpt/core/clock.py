"""Which clock the times of a process are of: what makes times of several processes comparable."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import msgspec

from .limits import MAX_NAME_CHARS

_TRIES = 5


class Clock(msgspec.Struct, frozen=True):
    """CLOCK_MONOTONIC of one process. Where two `name`s are equal, its times are one time line as they are: processes
    of one boot and one time namespace. Else `epoch_ns`, Unix time minus monotonic time when it was looked at, relates
    them: exact between the time namespaces of a host, and as good as their wall clocks between hosts."""

    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
    epoch_ns: int


def clock() -> Clock:
    """This process's, now."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # some sandboxes have none
        boot = ""
    try:
        namespace = os.readlink("/proc/self/ns/time")
    except OSError:  # before Linux 5.6 there is one for all
        namespace = ""
    return Clock(f"{boot} {namespace}", min(_look() for _ in range(_TRIES))[1])


def _look() -> tuple[int, int]:
    """How long the look took, which is how wrong it may be, and what it saw."""
    before_ns = time.monotonic_ns()
    unix_ns = time.time_ns()
    after_ns = time.monotonic_ns()
    return after_ns - before_ns, unix_ns - (before_ns + after_ns) // 2
