"""Faults for tests: real ones where this machine allows it, else by a library that is loaded into the saver.

Mounts are made in a mount namespace of their own, so nothing of them is left when the test has ended, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.system.processes import until

_EXT4_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_FILLER = "filler"


# --- what this machine has -----------------------------------------------------------------------------------------


def missing(*needs: str) -> str:
    """Why a test that needs these cannot run here, "" if it can."""
    return next((reason for need in needs if (reason := _MISSING[need]())), "")


def _no_root() -> str:
    return "" if os.geteuid() == 0 and shutil.which("unshare") else "mounting a filesystem needs root"


def _no_loop() -> str:
    return _no_root() or ("" if Path("/dev/loop-control").exists() and shutil.which("mkfs.ext4") else "no loop devices")


def _no_compiler() -> str:
    return "" if shutil.which("cc") else "the fault library needs a C compiler (cc)"


def _no_memory_cgroup() -> str:
    try:
        with memory_limit():
            return ""
    except OSError as error:
        return f"no memory cgroup can be made here ({error})"


_MISSING: dict[str, Callable[[], str]] = {
    "root": _no_root, "loop": _no_loop, "cc": _no_compiler, "cgroup": _no_memory_cgroup,
}  # fmt: skip


# --- mounts --------------------------------------------------------------------------------------------------------


class Namespace:
    """A mount namespace that lasts as long as the block; its mounts end with it."""

    def __enter__(self) -> Namespace:
        command = ["unshare", "--mount", "--propagation", "private", "cat"]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE)  # ends when its standard input does
        ours = os.readlink("/proc/self/ns/mnt")
        until(lambda: os.readlink(self.path) != ours, "a mount namespace")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(30)

    @property
    def path(self) -> str:
        return f"/proc/{self._holder.pid}/ns/mnt"

    @property
    def wrapper(self) -> list[str]:
        """Goes before a command that is to run in it."""
        return ["nsenter", f"--mount={self.path}"]

    def seen(self, path: str | Path) -> Path:
        """`path` of the namespace, from outside."""
        return Path(f"/proc/{self._holder.pid}/root", str(path).lstrip("/"))


def mount(path: Path, *options: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *options, path], check=True)


def unmount(path: Path) -> None:
    subprocess.run(["umount", path], check=True)


def small_disk(path: Path, size: str = "4m") -> None:
    mount(path, "-t", "tmpfs", "-o", f"size={size}", "none")


def remount(path: Path, how: str) -> None:
    mount(path, "-o", f"remount,{how}")


def fill(disk: Path, leave_bytes: int = 0) -> None:
    """Take all space of `disk` but `leave_bytes`, a multiple of 4096."""
    path = disk / _FILLER
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(path, path.stat().st_size - leave_bytes)


def make_room(disk: Path) -> None:
    (disk / _FILLER).unlink()


def loop_disk(image: Path, path: Path, kind: str = "ext4") -> None:
    """A filesystem in a sparse file, mounted."""
    image.parent.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run([f"mkfs.{kind}", "-q", "-E", "lazy_itable_init=0", image], check=True)
    mount(path, "-o", "loop", str(image))


def shut_down(disk: Path) -> None:
    """Until it is mounted anew every operation on this ext4 ends in EIO, as after an error of its device."""
    fd = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _EXT4_SHUTDOWN, (1).to_bytes(4, "little"))  # without flushing the log
    finally:
        os.close(fd)


# --- within the saver ----------------------------------------------------------------------------------------------


class Faults:
    """Steers `faults.c` in every process that was started with `environment`."""

    def __init__(self, folder: Path, below: Path) -> None:
        """`folder` exists once `build` was called, by whichever process. Syncs below `below` count."""
        self._folder = folder
        self.environment = {
            "LD_PRELOAD": str(folder / "faults.so"), "FAULTS": str(folder), "FAULTS_BELOW": str(below),
        }  # fmt: skip

    def build(self) -> Faults:
        self._folder.mkdir(parents=True)
        source = Path(__file__).with_suffix(".c")
        library = self._folder / "faults.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-lpthread"], check=True)
        return self

    def fail_sync(self, number: int, code: int) -> None:
        """The `number`-th sync from now on, 1 for the next."""
        self._write("order", f"fail {number} {code}")

    def hold_sync(self, number: int) -> None:
        (self._folder / "held").unlink(missing_ok=True)
        self._write("order", f"hold {number}")

    def until_held(self) -> None:
        until((self._folder / "held").exists, "the saver is at that sync")

    def none(self) -> None:
        self._write("order", "none")

    def set_clock(self, offset_s: int) -> None:
        self._write("clock", str(offset_s))

    def syncs(self) -> list[str]:
        """The path of every sync so far."""
        path = self._folder / "syncs"
        return path.read_text().splitlines() if path.exists() else []

    def _write(self, name: str, text: str) -> None:
        fd, temporary = tempfile.mkstemp(dir=self._folder)
        os.write(fd, text.encode())
        os.close(fd)
        os.replace(temporary, self._folder / name)


# --- memory --------------------------------------------------------------------------------------------------------


class MemoryLimit:
    """A memory cgroup with so little that whoever is put into it is killed by the kernel at its next allocation."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def catch(self, pid: int) -> None:
        (self._path / "cgroup.procs").write_text(str(pid))

    @property
    def kills(self) -> int:
        for name in ("memory.oom_control", "memory.events"):
            with contextlib.suppress(OSError):
                return next(int(line.split()[1]) for line in (self._path / name).read_text().splitlines()
                            if line.startswith("oom_kill "))  # fmt: skip
        raise AssertionError(f"{self._path} counts no kills")


@contextlib.contextmanager
def memory_limit() -> Iterator[MemoryLimit]:
    """Raises OSError where no memory cgroup can be made."""
    version_1 = Path("/sys/fs/cgroup/memory")
    parent, name = (version_1, "memory.limit_in_bytes") if version_1.is_dir() else (_own_cgroup(), "memory.max")
    path = Path(tempfile.mkdtemp(prefix="async-ckpt-test-", dir=parent))
    try:
        (path / name).write_text("4096")
        yield MemoryLimit(path)
    finally:
        until(lambda: not (path / "cgroup.procs").read_text(), "the cgroup is empty")
        path.rmdir()


def _own_cgroup() -> Path:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    relative = next((line.split("::")[1] for line in lines if line.startswith("0::")), "/")
    return Path("/sys/fs/cgroup", relative.lstrip("/"))


def enter(namespace: str) -> None:
    """Move this process, which must not have threads yet, into a mount namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(namespace, os.O_RDONLY)
    try:
        if libc.setns(fd, 0x00020000) != 0:  # CLONE_NEWNS
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    finally:
        os.close(fd)
