"""Will a saver work on this machine? Each check looks at the real thing and says what to do."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Location, Url
from async_ckpt.core.slots import SHM
from async_ckpt.core.transport import Ipc, transport_of

from .asking import holder
from .collection import tree_bytes
from .datafile import ALIGN_BYTES
from .status import wall_clock_s

_SMALL_SHM_BYTES = 256 << 20  # Docker's default is 64 MiB
_LITTLE_SPACE_BYTES = 1 << 30
_FEW_INODES = 1000
_FEW_FILES = 1024
_FSYNC_TRIES = 5
_SLOW_FSYNC_S = 0.1
_NEEDED = ("msgspec", "pyzmq", "uvloop", "xxhash")
_OPTIONAL = ("torch", "peft", "transformers", "safetensors", "obstore", "rich", "shtab")


class Finding(msgspec.Struct, frozen=True):
    """`verdict`: "fail" if saves will not work, "warn" if they may not, or slowly. `advice` is empty if it is "ok"."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(roots: Sequence[Location], bind: str | None) -> Iterator[Finding]:
    """One finding after the other. `roots` and `bind` are looked at if they are given. Leaves nothing behind."""
    yield from _shared_memory()
    yield from _left_in_shared_memory()
    yield from _limits()
    for root in roots:
        if isinstance(root, Url):
            from .object_examination import examine_store

            yield from examine_store(root)
        else:
            yield from _storage(root)
    if bind is not None:
        yield from _endpoint(bind)
    yield from _clock()
    yield from _versions()


def _shared_memory() -> Iterator[Finding]:
    info = os.statvfs(SHM)
    size, free = info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize
    found = f"{size} bytes, {free} free"
    advice = ("slots need twice a checkpoint's size: `docker run --shm-size`, in Kubernetes an emptyDir with medium: "
              "Memory, elsewhere `mount -o remount,size=... /dev/shm`")  # fmt: skip
    small = free < _SMALL_SHM_BYTES
    yield Finding("/dev/shm", "warn" if small else "ok", found, advice if small else "")


def _left_in_shared_memory() -> Iterator[Finding]:
    """Runs whose ranks and saver are all dead hold memory until a saver of the same endpoint starts."""
    home = SHM / f"async-ckpt-{os.getuid()}"
    if not home.is_dir():
        yield Finding("slots", "ok", "none in shared memory")
        return
    for run in sorted(path for path in home.iterdir() if path.is_dir()):  # a file is no run: see core/slots.py
        pids = _mapped_by(run)
        total = tree_bytes(run)
        if pids:
            yield Finding("slots", "ok", f"{run}: {total} bytes, in use by pids {pids}")
        else:
            yield Finding("slots", "warn", f"{run}: {total} bytes, mapped by no process",
                          "a job that comes back in time takes them up; if none will, start a saver on the same "
                          "endpoint once, or remove the directory")  # fmt: skip


def _mapped_by(run: Path) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{run}/" in (folder / "maps").read_text():
                found.append(int(folder.name))
    return sorted(found)


def _limits() -> Iterator[Finding]:
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked} bytes"
    yield Finding("memlock", "ok", f"{shown}; counts only where CUDA pins the slots and the driver honours it")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < _FEW_FILES
    advice = f"raise it to {_FEW_FILES} or more (ulimit -n): a saver needs about two a rank"
    yield Finding("nofile", "warn" if few else "ok", f"{files} open files", advice if few else "")


def _storage(root: Path) -> Iterator[Finding]:
    if not root.is_dir():
        yield Finding("root", "fail", f"{root} is not a directory", "make it, or mount its volume")
        return
    info = os.statvfs(root)
    free = info.f_bavail * info.f_frsize
    little = free < _LITTLE_SPACE_BYTES
    found = f"{free} bytes free below {root}"
    yield Finding("space", "warn" if little else "ok", found, "gc, or a larger volume" if little else "")
    few = info.f_files > 0 and info.f_favail < _FEW_INODES  # some filesystems have no fixed number of them
    yield Finding("inodes", "warn" if few else "ok", f"{info.f_favail} free" if info.f_files else "no fixed number",
                  "remove small files, or make the filesystem with more inodes" if few else "")  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix=".async-ckpt-doctor-", dir=root) as folder:
            yield _fsync(Path(folder))
            yield _direct(Path(folder))
    except OSError as error:
        yield Finding("write", "fail", f"cannot write below {root}: {error.strerror or error}",
                      f"make it writable for uid {os.getuid()}")  # fmt: skip


def _fsync(folder: Path) -> Finding:
    times = []
    for number in range(_FSYNC_TRIES):
        fd = os.open(folder / f"sync-{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, bytes(ALIGN_BYTES))
            started_s = time.perf_counter()
            os.fsync(fd)
            times.append(time.perf_counter() - started_s)
        finally:
            os.close(fd)
    median_s = sorted(times)[len(times) // 2]
    slow = median_s > _SLOW_FSYNC_S
    found = f"{median_s * 1e3:.2f} ms (median of {_FSYNC_TRIES}, 4 KiB)"
    advice = "a save takes several of these: expect slow commits, training does not wait"
    return Finding("fsync", "warn" if slow else "ok", found, advice if slow else "")


def _direct(folder: Path) -> Finding:
    """What matters is the write: some filesystems accept the flag and refuse that."""
    try:
        fd = os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        try:
            with mmap.mmap(-1, ALIGN_BYTES) as block:
                os.write(fd, block)
        finally:
            os.close(fd)
    except OSError as error:
        return Finding("O_DIRECT", "warn", f"refused: {error.strerror}",
                       "writes go through the page cache: right, but slower and with more CPU")  # fmt: skip
    return Finding("O_DIRECT", "ok", "works")


def _endpoint(bind: str) -> Iterator[Finding]:
    try:
        transport = transport_of(bind)
        socket = transport.path if isinstance(transport, Ipc) else None
        lock = transport.lock_path() if socket is None else socket.with_name(socket.name + ".lock")
        pid = holder(lock)
    except CheckpointError as error:
        yield Finding("endpoint", "fail", str(error), "give another --bind")
        return
    except OSError as error:
        yield Finding("endpoint", "fail", f"{bind}: {error.strerror or error}", "run this as the saver's user")
        return
    if pid is not None:
        yield Finding("endpoint", "ok", f"{bind} is served by pid {pid}")
    elif socket is not None and socket.exists():
        advice = "a saver was killed: the next one on this endpoint takes over, and commits what is staged"
        yield Finding("endpoint", "warn", f"{socket} is there, but no saver holds it", advice)
    else:
        yield Finding("endpoint", "ok", f"{bind} is free")


def _clock() -> Iterator[Finding]:
    """Ages come from the wall clock; everything that decides anything, from the monotonic one."""
    before, wall = time.monotonic_ns(), wall_clock_s()
    forward = time.monotonic_ns() >= before
    booted = wall - time.clock_gettime(time.CLOCK_BOOTTIME)
    sane = forward and wall > 1_600_000_000 and booted > 0
    yield Finding("clock", "ok" if sane else "warn", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall)),
                  "" if sane else "set the clock: ages of checkpoints will be wrong, nothing else")  # fmt: skip


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok" if sys.version_info >= (3, 10) else "fail", sys.version.split()[0])
    for name in (*_NEEDED, *_OPTIONAL):
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            if name in _NEEDED:
                yield Finding(name, "fail", "not installed", f"pip install {name}")
            else:
                yield Finding(name, "ok", "not installed; the saver does not need it")
