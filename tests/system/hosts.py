"""Hosts for tests: namespaces for network, processes, mounts and names, joined by veth pairs and two bridges.

Each host has a /dev/shm, a TMPDIR, a hostname and processes of its own; what it shares with the others is the file
system, so the folder of the test stands for the shared one. `training` (10.77.0.0/24) is the network that torch uses,
`side` (10.78.0.0/24) another one, so that a test can cut what the savers say to each other and let the training go on.

The namespaces have no names: they last as long as one process in each, which ends with its standard input, that is with
the test's own process, however that ends. `left` finds what is there all the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tests.ranks import ROOT
from tests.system.processes import Job, environment, until

T = TypeVar("T")
HOST_VARIABLE = "ASYNC_CKPT_TEST_HOST"  # the first process of the host that a rank of a job lives on
TRAINING, SIDE = "training", "side"
NETWORKS = {TRAINING: "10.77.0", SIDE: "10.78.0"}
SWITCH = 254  # its address in each network
_OWN = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc", "--propagation", "private",
        "--kill-child=SIGKILL"]  # fmt: skip
_SET_UP = """
set -e
mount -t tmpfs -o mode=1777,size=512m none /dev/shm
mount -t tmpfs -o mode=1777,size=128m none "$1"
mount --bind "$2" /etc/hosts
hostname "$3"
ip link set lo up
echo up
exec "$4" -ISc 'import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); sys.stdin.read()'
"""  # the last line is the host's init: it reaps orphans, and ends with its standard input
_KINDS = ("net", "uts", "ipc", "pid", "mnt")  # mounts last: /proc is another one afterwards
_made: set[str] = set()  # network namespaces of this session


@functools.cache
def impossible() -> str:
    """Why there can be no hosts here, "" if there can."""
    needed = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if needed:
        return f"needs {', '.join(needed)}"
    command = [*_OWN, "sh", "-c", "ip link add name b type bridge && mount -t tmpfs none /dev/shm"]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"namespaces are not allowed here: {done.stderr.strip()[-200:]}"


def left(within: Collection[str] = _made) -> list[int]:
    """The processes that live in one of these network namespaces: by default of all hosts and switches so far."""
    found = []
    for folder in Path("/proc").glob("[0-9]*") if within else ():
        with contextlib.suppress(OSError):
            if os.readlink(folder / "ns" / "net") in within:
                found.append(int(folder.name))
    return found


def end_left() -> None:
    for pid in left():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Host:
    """`pid` is its first process, as seen from outside."""

    def __init__(self, number: int, folder: Path, names: Path, tmp: Path) -> None:
        self.number = number
        self.name = f"host-{number}"
        self.tmp = tmp
        self._log = folder / f"{self.name}.log"
        with self._log.open("ab") as log:
            self._holder = subprocess.Popen(
                [*_OWN, "sh", "-c", _SET_UP, "sh", str(tmp), str(names), self.name, sys.executable],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"up\n", self._log.read_text()
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        self.pid = int(children.read_text())
        self.network = os.readlink(f"/proc/{self.pid}/ns/net")
        _made.add(self.network)
        self._processes = os.readlink(f"/proc/{self.pid}/ns/pid")

    @property
    def alive(self) -> bool:
        return self._holder.poll() is None

    def address(self, network: str = TRAINING) -> str:
        return f"{NETWORKS[network]}.{self.number}"

    def environment(self) -> dict[str, str]:
        """For processes that `popen` and `run` start there, and for ranks that `Job` does."""
        return environment() | {
            "TMPDIR": str(self.tmp), "GLOO_SOCKET_IFNAME": TRAINING, HOST_VARIABLE: str(self.pid),
        }  # fmt: skip

    def popen(self, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen:  # type: ignore[type-arg]
        enter = ["nsenter", "--target", str(self.pid), *(f"--{each}" for each in ("net", "uts", "ipc", "pid", "mount"))]
        return subprocess.Popen(
            [*enter, "--wd=" + str(ROOT), *command], env=self.environment() | dict(env or {}), start_new_session=True,
            **options,
        )  # fmt: skip

    def run(self, *command: str, timeout_s: float = 60.0) -> str:
        """What it prints. Raises CalledProcessError unless it exits with 0."""
        process = self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = process.communicate(timeout=timeout_s)
        if process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, command, output)
        return str(output)

    def seen(self, path: str | Path) -> Path:
        """`path` of the host, from outside."""
        return Path(f"/proc/{self.pid}/root", str(path).lstrip("/"))

    def pids(self) -> list[int]:
        """All its processes but the first, as seen from outside."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                pid = int(folder.name)
                if os.readlink(folder / "ns" / "pid") == self._processes and pid != self.pid and _command_line(pid):
                    found.append(pid)
        return sorted(found)

    def savers(self) -> list[int]:
        return [pid for pid in self.pids() if b"async_ckpt_saver" in _command_line(pid)]

    def the_saver(self) -> int:
        return until(lambda: len(found := self.savers()) == 1 and found[0], f"one saver on {self.name}")

    def log(self) -> str:
        """What its embedded savers have written."""
        paths = sorted(self.seen(self.tmp).rglob("saver.log"))
        return "".join(path.read_text(errors="replace") for path in paths)

    def in_shared_memory(self) -> list[str]:
        """The runs in its /dev/shm."""
        folder = self.seen(f"/dev/shm/async-ckpt-{os.getuid()}")
        return sorted(os.listdir(folder)) if folder.exists() else []

    def lose(self) -> None:
        """All its processes and its memory are gone at once, and nobody is told: cut its links first."""
        self._holder.kill()  # the kernel kills the first process with it, and all others with that
        self._holder.wait(30)
        until(lambda: not _command_line(self.pid) and not self.pids(), f"{self.name} is gone")
        _made.discard(self.network)  # the kernel gives its number to the next one that anybody makes

    def close(self) -> None:
        for stream in (self._holder.stdin, self._holder.stdout):
            if stream is not None:
                stream.close()
        self._holder.kill()
        self._holder.wait(30)


class Cluster:
    """`with Cluster(folder, 3) as cluster`: three hosts, `cluster.hosts[0]` to run rank 0.

    `shared_tmp`: all have the same TMPDIR, as where it lies on a network filesystem. At the end of the block every
    saver and all shared memory of the hosts that live must be gone by themselves; then the hosts are.
    """

    def __init__(self, folder: Path, hosts: int, *, shared_tmp: bool = False) -> None:
        self.folder = folder
        self._size = hosts
        self._shared_tmp = shared_tmp
        self._closing = contextlib.ExitStack()
        self._networks: set[str] = set()

    def __enter__(self) -> Cluster:
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            self._start(stack)
            self._closing = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._closing:
            if kind is None:
                self.quiet()
            elif isinstance(error, AssertionError):
                error.args = (f"{error}\n{self.logs()}",)

    def quiet(self, timeout_s: float = 40.0) -> None:
        """Every saver has ended by itself, and left nothing in shared memory."""
        living = [host for host in self.hosts if host.alive]
        try:
            until(lambda: not any(host.savers() or host.in_shared_memory() for host in living), "quiet", timeout_s)
        except AssertionError:
            found = {host.name: (host.savers(), host.in_shared_memory()) for host in living}
            raise AssertionError(
                f"savers and runs that are left after {timeout_s:g} s: {found}\n{self.logs()}"
            ) from None

    def logs(self) -> str:
        """The ends of the logs of all embedded savers."""
        return "\n".join(f"--- {host.name}\n{host.log()[-4000:]}" for host in self.hosts if host.alive)

    def cut(self, host: Host, network: str = TRAINING) -> None:
        self._switch_ip("link", "set", _port(network, host), "down")

    def heal(self, host: Host, network: str = TRAINING) -> None:
        self._switch_ip("link", "set", _port(network, host), "up")

    def job(
        self, target: str, ranks: Sequence[int], *args: str, env: Mapping[str, str] | None = None,
        each: Mapping[int, Mapping[str, str]] | None = None, on: Sequence[int] | None = None,
    ) -> Job:  # fmt: skip
        """`target` on `ranks[i]` ranks of host i, as torchrun would have it, or of the i-th of the hosts `on`. `each`:
        variables of the ranks of a host by its place. The folder that the ranks get is the cluster's."""
        places: list[Mapping[str, str]] = []
        chosen = self.hosts if on is None else [self.hosts[place] for place in on]
        for index, (host, count) in enumerate(zip(chosen, ranks, strict=False)):
            places += [
                {
                    **host.environment(),
                    "LOCAL_RANK": str(local),
                    "LOCAL_WORLD_SIZE": str(count),
                    "GROUP_RANK": str(index),
                    "MASTER_ADDR": chosen[0].address(),
                    **dict((each or {}).get(index, {})),
                }
                for local in range(count)
            ]
        return Job(target, len(places), self.folder, *args, env=env, each=places)

    def keep(self, context: contextlib.AbstractContextManager[T]) -> T:
        """Enter it; it ends with the hosts, when nothing on them needs it any more."""
        return self._closing.enter_context(context)

    def switch_command(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._switch.pid}/ns/net", *command]

    # --- setting up ------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """The kernel gives the numbers of namespaces away again, also to other sessions of tests."""
        until(lambda: not left(self._networks), "all processes of the hosts are gone")
        _made.difference_update(self._networks)

    def _start(self, stack: contextlib.ExitStack) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        names = self.folder / "hosts"
        lines = [f"{NETWORKS[TRAINING]}.{number} host-{number}\n" for number in range(1, self._size + 1)]
        names.write_text("127.0.0.1 localhost\n" + "".join(lines))
        tmp = self.folder / "tmp"
        tmp.mkdir()
        self._switch = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        stack.callback(self._end_switch)
        own = os.readlink("/proc/self/ns/net")
        path = f"/proc/{self._switch.pid}/ns/net"
        until(lambda: os.readlink(path) != own, "the switch")
        self._networks.add(os.readlink(path))
        _made.update(self._networks)
        for network, prefix in NETWORKS.items():
            self._switch_ip("link", "add", "name", network, "type", "bridge")
            self._switch_ip("addr", "add", f"{prefix}.{SWITCH}/24", "dev", network)
            self._switch_ip("link", "set", network, "up")
        self.hosts: list[Host] = []
        for number in range(1, self._size + 1):
            own_tmp = tmp
            if self._shared_tmp:  # the mount is made all the same, where nobody looks
                own_tmp = self.folder / "nowhere"
                own_tmp.mkdir(exist_ok=True)
            host = Host(number, self.folder, names, own_tmp)
            stack.callback(host.close)
            host.tmp = tmp
            self._networks.add(host.network)
            self._join(host)
            self.hosts.append(host)

    def _join(self, host: Host) -> None:
        for network, prefix in NETWORKS.items():
            port = _port(network, host)
            subprocess.run(
                ["ip", "link", "add", "name", port, "netns", str(self._switch.pid), "type", "veth", "peer",
                 "name", network, "netns", str(host.pid)], check=True,
            )  # fmt: skip
            self._switch_ip("link", "set", port, "master", network)
            self._switch_ip("link", "set", port, "up")
            inside = ["nsenter", f"--net=/proc/{host.pid}/ns/net", "ip"]
            subprocess.run([*inside, "addr", "add", f"{prefix}.{host.number}/24", "dev", network], check=True)
            subprocess.run([*inside, "link", "set", network, "up"], check=True)

    def _switch_ip(self, *arguments: str) -> None:
        subprocess.run(self.switch_command("ip", *arguments), check=True)

    def _end_switch(self) -> None:
        assert self._switch.stdin is not None
        self._switch.stdin.close()
        self._switch.kill()
        self._switch.wait(30)


def enter(pid: str) -> None:
    """Within a rank that has no threads yet: become one of the host's processes. A namespace of processes is entered
    by a child only, so the rank goes on in a child, and this process ends as that one does."""
    libc = ctypes.CDLL(None, use_errno=True)
    files = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in _KINDS]
    for kind, file in zip(_KINDS, files, strict=True):
        if libc.setns(file, 0) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {kind} of {pid}")
        os.close(file)
    child = os.fork()
    if child == 0:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda got, _: os.kill(child, got))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def _port(network: str, host: Host) -> str:
    return f"{network}-{host.number}"


def _command_line(pid: int) -> bytes:
    """Empty for a process that is gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
