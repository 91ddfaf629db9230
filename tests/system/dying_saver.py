"""A saver that kills itself just before a system call of its choice: the product as it is, its system calls counted.

    python -m tests.system.dying_saver LOG POINT OCCURRENCE python -m async_ckpt_saver run --bind ... --root ...

A *point* is the name of a system call that changes something outside the process, with the path that it is about and
the function of the saver that wants it: "pwrite .checkpoint-N.tmp/adapter_model.safetensors 0, write". "settle" (a mark
in shared memory, which is no system call) and "send Settled" (a word to a rank) are points as well. `POINT` "" never
dies. LOG gets a line a point; where it died, that is the last. `test_crash` holds the points against what strace sees.
"""

from __future__ import annotations

import fcntl
import os
import re
import runpy
import shutil  # noqa: F401  it looks at import time which functions of os take a dir_fd, so it has to see the real ones
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What changes files or directories, and whether its first argument is a descriptor.
CALLS = {
    "open": False, "mkdir": False, "rmdir": False, "symlink": False, "unlink": False, "rename": False, "replace": False,
    "pwrite": True, "ftruncate": True, "posix_fallocate": True, "fsync": True, "fdatasync": True,
}  # fmt: skip
_SENT = frozenset({"Granted", "Started", "Settled", "Ack"})


class Points:
    """Counts what is passed, and kills this process at the `occurrence`-th `point`."""

    def __init__(self, log: str, point: str, occurrence: int) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        self._point, self._occurrence = point, occurrence
        self._passed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def passed(self, point: str) -> None:
        with self._lock:
            self._passed[point] += 1
            os.write(self._log, f"{point}\n".encode())
            if point == self._point and self._passed[point] == self._occurrence:
                os.kill(os.getpid(), signal.SIGKILL)

    def before(self, module: Any, name: str, describe: Callable[..., str | None]) -> None:
        """From now on `module.name` passes the point that `describe` makes of its arguments, if it makes one."""
        real = getattr(module, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            point = describe(*arguments, **named)
            if point is not None:
                self.passed(point)
            return real(*arguments, **named)

        setattr(module, name, counted)


def calling() -> str:
    """The function of the saver that the innermost call is for; helpers and the library do not count."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if ("/async_ckpt_saver/" in path or "/async_ckpt/" in path) and not path.endswith("/filesystem.py"):
            return frame.f_code.co_name
        frame = frame.f_back
    return "?"


def normal(path: str) -> str:
    """The same for every run, step, slot, rank and attempt: what the point is called after."""
    held = re.match(r"/proc/self/fd/\d+", path)
    if held is not None:  # the directory that the saver holds open
        path = os.readlink(held[0]) + path[held.end() :]
    path = re.sub(r"^.*/async-ckpt-\d+/[0-9a-f]{12}-[0-9a-f]{16}(/|$)", r"shm\1", path)
    path = re.sub(r"^.*/ackpt-\w+/[^/]+", "job", path)
    path = re.sub(r"\.([a-z]+(?:-\d+)?)\.[0-9a-zA-Z_-]+\.(tmp|trash)", r".\1.\2", path)
    return re.sub(r"(checkpoint|slot|record|async-ckpt)-\d+", r"\1-N", path)


def _system_call(name: str, is_descriptor: bool) -> Callable[..., str | None]:
    def describe(what: Any, *arguments: Any, **named: Any) -> str | None:
        if name == "open" and not (arguments[0] if arguments else named["flags"]) & os.O_CREAT:
            return None  # reading changes nothing
        if is_descriptor:
            path = os.readlink(f"/proc/self/fd/{what}")
        elif (directory := named.get("dir_fd")) is not None:  # how shutil.rmtree goes
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), os.fsdecode(what))
        else:
            path = os.fsdecode(arguments[0] if name == "symlink" else what)
        offset = f" {arguments[1]}" if name == "pwrite" else ""
        return f"{name} {normal(path)}{offset}, {calling()}"

    return describe


def install(points: Points) -> None:
    from async_ckpt.core.slots import StateFile
    from async_ckpt_saver import filesystem, server

    for name, is_descriptor in CALLS.items():
        points.before(os, name, _system_call(name, is_descriptor))
    points.before(fcntl, "flock", _lock)
    points.before(Path, "write_bytes", lambda path, data: f"write {normal(str(path))}, {calling()}")
    points.before(filesystem, "_renameat2", lambda source, target: f"renameat2 {normal(source)}, {calling()}")
    points.before(StateFile, "settle", lambda state, step: "settle")
    points.before(server, "encode", lambda message: _spoken(type(message).__name__))


def _lock(fd: int, operation: int) -> str:
    return f"flock {normal(os.readlink(f'/proc/self/fd/{fd}'))}, {calling()}"


def _spoken(kind: str) -> str | None:
    return f"send {kind}" if kind in _SENT else None


def main(log: str, point: str, occurrence: str, *command: str) -> None:
    python, m, module, *arguments = command
    assert (python, m) == (sys.executable, "-m")
    install(Points(log, point, int(occurrence)))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def wrapper(log: Path, point: str, occurrence: int) -> Sequence[str]:
    """For `Daemon`: what goes before the command."""
    return [sys.executable, "-m", "tests.system.dying_saver", str(log), point, str(occurrence)]


if __name__ == "__main__":
    main(*sys.argv[1:])
