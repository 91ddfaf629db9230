"""A short slice of the kills: one of each kind, and a few points. All of them: make test-crash."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.system import crash, dying_saver
from tests.system.processes import home

# What reads, and what ends with the process that did it: a kill before one of these is a kill before the call after it.
_HARMLESS = {"access", "close", "dup", "epoll_ctl", "epoll_pwait", "epoll_wait", "eventfd2", "execve", "faccessat2",
             "fadvise64", "fcntl", "fstat", "fstatfs", "getcwd", "getdents64", "ioctl", "lseek", "lstat", "mmap",
             "newfstatat", "poll", "pread64", "read", "readlink", "readlinkat", "stat", "statfs", "statx", "chdir",
             "pidfd_open", "pidfd_getfd", "socket", "epoll_create1", "dup3", "getsockopt"}  # fmt: skip
_AS_PYTHON_SAYS = {
    "openat": "open",
    "pwrite64": "pwrite",
    "unlinkat": "unlink",
    "mkdirat": "mkdir",
    "rename": "replace",
}
_SLICE = ("renameat2 job/runs/.checkpoint-N.tmp, ", "replace job/runs/.latest.tmp", "settle",
          "renameat2 job/runs/checkpoint-N", "unlink job/runs/.probe")  # fmt: skip


@pytest.mark.timeout(600)
def test_kills() -> None:
    """One of each scenario, and of the points those at which a commit, the link, retention and a slot turn over."""
    passed = crash.points(home() / "points")
    chosen = Counter({point: count for point, count in passed.items() if point.startswith(_SLICE)})
    assert len(chosen) == len(_SLICE)
    trials = [*crash.random_trials(len(crash.SCENARIOS), 7), *crash.point_trials(chosen, len(chosen), 7)]
    assert [result.broken for result in crash.run_trials(trials, 4)] == [""] * 11


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_every_system_call_is_a_point(folder: Path) -> None:
    """What strace sees the saver change in the run's directory is what the points count, call by call."""

    def traced(log: Path) -> Sequence[str]:
        return ["strace", "-DDD", "-f", "-y", "-q", "-s", "0", "-e", "trace=%file,%desc", "-o", str(log)]

    named = crash.points(folder / "job-1")
    counted: Counter[str] = Counter()
    for point, count in named.items():
        call = point.partition(",")[0].split()
        if len(call) > 1 and "/runs" in call[1]:
            counted[_below_runs(call[0], call[1])] += count
    seen: Counter[str] = Counter()
    for line, count in crash.points(folder / "job-2", wrapped_by=traced).items():
        call_of_line = _changes(line)
        if call_of_line is not None:
            seen[call_of_line] += count
    assert sum(seen.values()) > crash.STEPS * 30
    assert (seen - counted, counted - seen) == (Counter(), Counter())


def _changes(line: str) -> str | None:
    """The call in a line of strace as a point, if it may change something in the run's directory."""
    match = re.match(r"\d+ +(\w+)\((.*)", line)  # a call's first half, where another thread's came between
    if match is None or "/runs" not in line or match[1] in _HARMLESS:
        return None
    call, arguments = match[1], match[2]
    if call == "openat" and "O_CREAT" not in arguments:
        return None
    if call == "symlink":
        arguments = arguments.partition(",")[2]
    if call == "unlinkat" and "AT_REMOVEDIR" in arguments:
        call = "rmdir"
    first = re.match(r'\s*(?:AT_FDCWD|\d+)?(?:<(/[^>]*)>)?(?:, )?(?:"([^"]*)")?', arguments)
    assert first is not None
    descriptor, name = first.groups(default="")
    path = name if name.startswith("/") else f"{descriptor}/{name}".rstrip("/")
    return _below_runs(_AS_PYTHON_SAYS.get(call, call), dying_saver.normal(path))


def _below_runs(call: str, path: str) -> str:
    return f"{call} runs{path.partition('/runs')[2]}"
