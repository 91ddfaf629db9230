"""`multiprocessing.shared_memory` deletes a segment that others still use, when a process that only attached exits.

An owner process makes a segment and lives on. An unrelated process attaches to it by name, closes it, and exits. Then
the name in /dev/shm is looked for: it is the visitor's resource tracker, a process of its own, that deletes it a moment
later. The same is done with a plain file in /dev/shm that both map.

    python docs/decisions/measure/shared_memory.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

BYTES = 1 << 20
TRACKER_S = 2.0  # the tracker acts once the visitor is gone
ATTACH_SEGMENT = """
import sys
from multiprocessing.shared_memory import SharedMemory
options = {"track": False} if "untracked" in sys.argv else {}
segment = SharedMemory(sys.argv[1], **options)
segment.close()
"""
ATTACH_FILE = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mmap.mmap(file.fileno(), 0).close()
"""


def visit(code: str, *arguments: str) -> int:
    """A process that attaches and exits in good order. Returns its exit status."""
    return subprocess.run([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL, check=False).returncode


def report(name: str, path: Path, status: int) -> None:
    started_s = time.monotonic()
    while path.exists() and time.monotonic() - started_s < TRACKER_S:
        time.sleep(0.001)
    after_ms = (time.monotonic() - started_s) * 1000
    outcome = "still there" if path.exists() else f"DELETED {after_ms:.0f} ms later"
    print(f"{name:32} visitor's exit status {status}, {outcome}", flush=True)


def segment(name: str, *arguments: str) -> None:
    owner = SharedMemory(create=True, size=BYTES)
    path = Path("/dev/shm") / owner.name
    report(name, path, visit(ATTACH_SEGMENT, owner.name, *arguments))
    owner.close()
    if path.exists():
        owner.unlink()
    else:
        resource_tracker.unregister(owner._name, "shared_memory")  # type: ignore[attr-defined]  # else it warns at exit


def plain_file() -> None:
    path = Path("/dev/shm") / "async-ckpt-measure"
    with path.open("xb") as file:
        file.truncate(BYTES)
    report("plain file, mapped by both", path, visit(ATTACH_FILE, str(path)))
    path.unlink()


def main() -> None:
    print(f"Python {sys.version.split()[0]}; the owner is alive all the time")
    segment("SharedMemory(name)")
    if sys.version_info >= (3, 13):
        segment("SharedMemory(name, track=False)", "untracked")
    plain_file()


if __name__ == "__main__":
    main()
