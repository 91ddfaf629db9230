"""A short slice of the kills: one of each kind, and a few points. All of them: make test-crash."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
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
    crash.points(folder / "job-2", wrapped_by=traced)
    seen = Counter(_changes((folder / "job-2" / "points").read_text(errors="replace")))
    assert sum(seen.values()) > crash.STEPS * 30
    assert (seen - counted, counted - seen) == (Counter(), Counter())


def _changes(log: str) -> Iterator[str]:
    """The calls in a log of strace, as points, that may change something in the run's directory."""
    held: dict[str, str] = {}  # descriptor -> what it was last opened as
    for line in log.splitlines():
        line = re.sub(r"/proc/self/fd/(\d+)", lambda match: held.get(match[1], match[0]), line)
        if (opened := re.search(r"= (\d+)<(/[^>]*)>$", line)) is not None:
            held[opened[1]] = opened[2]
        call = re.match(r"\d+ +(\w+)\((.*)", line)  # its first half, where another thread's came between
        if call is not None and call[1] not in _HARMLESS:
            yield from _change(call[1], call[2])


def _change(call: str, arguments: str) -> Iterator[str]:
    if call == "openat" and "O_CREAT" not in arguments:
        return
    if call == "symlink":
        arguments = arguments.partition(",")[2]
    if call == "unlinkat" and "AT_REMOVEDIR" in arguments:
        call = "rmdir"
    first = re.match(r'\s*(?:AT_FDCWD|\d+)?(?:<(/[^>]*)>)?(?:, )?(?:"([^"]*)")?', arguments)
    assert first is not None
    descriptor, name = first.groups(default="")
    path = name if name.startswith("/") else f"{descriptor}/{name}".rstrip("/")
    if "/runs" in path:
        yield _below_runs(_AS_PYTHON_SAYS.get(call, call), dying_saver.normal(path))


def _below_runs(call: str, path: str) -> str:
    return f"{call} runs{path.partition('/runs')[2]}"
