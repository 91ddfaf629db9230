"""CPU, memory and disk of processes and directories, as the kernel counts them."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("async-ckpt", "torch", "torch_checkpointing", "peft", "transformers", "safetensors", "pyzmq", "msgspec")


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds that these processes have used, all their threads included, user and system. 0 for one that ended.

    Kernel threads that write pages back later are on nobody's account: buffered writers look cheaper than they are.
    """
    return sum(_cpu_s(pid) for pid in pids)


def _cpu_s(pid: int) -> float:
    clock = time.CLOCK_PROCESS_CPUTIME_ID if pid == os.getpid() else ((~pid) << 3) | 2  # clock_getcpuclockid(3)
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0


def main_thread_cpu_s(pid: int) -> float:
    """Of its first thread alone, in which an event loop runs."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def children(pid: int) -> list[int]:
    """All descendants of `pid` that are alive."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            direct = [int(each) for each in path.read_text().split()]
        except OSError:
            continue
        for child in direct:
            found += [child, *children(child)]
    return found


def memory_bytes(pid: int) -> dict[str, int]:
    """`pss`: shared pages divided among those who map them; `uss`: what would be freed if the process ended. Files in
    shared memory are neither: they stay, whoever maps them, and count where they are made."""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return {"pss": 0, "uss": 0}
    kib = dict.fromkeys(("Pss", "Private_Clean", "Private_Dirty"), 0)
    shared_memory = False
    for line in lines:
        name, _, value = line.partition(":")
        if name in kib:
            kib[name] += 0 if shared_memory else int(value.split()[0])
        elif "-" in line.split(maxsplit=1)[0]:  # a mapping begins; of its values none has a dash in its name
            shared_memory = " /dev/shm/" in line
    return {"pss": kib["Pss"] * 1024, "uss": (kib["Private_Clean"] + kib["Private_Dirty"]) * 1024}


def disk_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def drop_from_page_cache(directory: Path) -> None:
    """So that the next read of these files comes from the device."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine() -> dict[str, str]:
    """What the figures depend on."""
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")]  # fmt: skip
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    found = {
        "cpu": f"{len(os.sched_getaffinity(0))} x {models[0] if models else platform.machine()}",
        "memory": f"{memory_kib / (1 << 20):.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def filesystem(path: Path) -> str:
    """The type of the filesystem on which `path` lies."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if os.path.commonpath([str(path.resolve()), mount]) == mount and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]
