"""Names for processes that stay right when pids are reused."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .protocol import Process

_START_TIME_FIELD = 19  # of /proc/<pid>/stat after the command's ')': field 22 in proc(5)


def now_ticks() -> int:
    """Now, as `Process.start_ticks` counts: clock ticks since the machine was booted."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def uid_of(pid: int) -> int:
    """The effective user of a process. Not the owner of its folder in /proc, which is root if it cannot be dumped.

    Raises OSError if there is no such process, or if it is not ours to look at."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[2])
    raise ProcessLookupError(f"/proc/{pid}/status names no user")


def process_of(pid: int) -> Process:
    """Raises OSError if there is no such process, or if it is not ours to look at."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    start_ticks = int(stat[stat.rindex(")") + 2 :].split()[_START_TIME_FIELD])
    return Process(pid, start_ticks, os.readlink("/proc/self/ns/pid"))
