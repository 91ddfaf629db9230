"""Hosts that are none: savers with a /dev/shm of their own, ranks without torch, and a wire that can be cut.

A host is a mount namespace with its own tmpfs on /dev/shm, which is what makes it another one for all of our code.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import (
    PROTOCOL,
    Claim,
    Granted,
    ImageFile,
    Layout,
    Lead,
    LeadOpen,
    LeadWanted,
    Options,
    Ping,
    Ready,
    Refused,
    Register,
    SaveRecord,
    Settled,
    Staged,
    Started,
    Status,
    StatusWanted,
)
from async_ckpt.core.region import Region
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import Phase, SlotPaths, StateFile
from async_ckpt_saver.hosts.spans import spans_of
from async_ckpt_saver.status import HostStatus, decode_status
from tests.saver.hosts.wire import Wire
from tests.saver.saver_process import Peer, SaverProcess, until

COLUMNS = 2048
ROWS = 1536  # of each tensor; a step has 2 * ROWS * COLUMNS * 4 bytes: some pieces for each rank


def _own_shm(size: str = "50%") -> list[str]:
    shell = ["sh", "-c", f'mount -t tmpfs -o size={size} shm /dev/shm && exec "$@"', "sh"]
    return ["unshare", "--mount", "--propagation", "private", *shell]


def possible() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*_own_shm(), "true"], capture_output=True).returncode == 0


class Host:
    """One saver."""

    def __init__(
        self, name: str, folder: Path, root: Path, *, lease_s: float, size: str, options: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.name, self._folder, self.root, self._size = name, folder, root, size
        self._options = ["--log-level", "debug", "--grace-s", "0", "--lease-s", f"{lease_s:g}", *options]
        self._env = env
        self.endpoint = f"ipc://{folder}/{name}/saver.sock"
        (folder / name).mkdir(mode=0o700)
        self.start()

    def start(self, *options: str) -> None:
        """The namespace, and all that is in its shared memory, stays as long as the keeper lives. `options` are for the
        saver, besides its own."""
        if not hasattr(self, "_keeper"):
            self._keeper = subprocess.Popen([*_own_shm(self._size), "sleep", "infinity"])
            until(lambda: self._device(self._keeper.pid) != os.stat("/dev/shm").st_dev, "a /dev/shm of its own")
        wrapper = ["nsenter", "--mount", f"--target={self._keeper.pid}"]
        log = self._folder / f"{self.name}.log"
        self.saver = SaverProcess(
            self.endpoint, self.root, log, *self._options, *options, env=self._env, wrapper=wrapper
        ).up()

    @property
    def shm(self) -> str:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{self._device(self.saver.process.pid):x}"

    def kill(self) -> None:
        self.saver.kill()

    def in_its_mounts(self, *command: str) -> None:
        subprocess.run(["nsenter", "--mount", f"--target={self._keeper.pid}", *command], check=True)

    def copies(self, *, whole: bool = True) -> list[Path]:
        """Checkpoints that its saver keeps for other hosts, or those that are being made."""
        folder = self.seen_from_here(f"/dev/shm/async-ckpt-{os.getuid()}")
        return [path / "checkpoint" for path in folder.glob("copy-*") if (path / "copy.msgpack").exists() == whole]

    def seen_from_here(self, path: str | Path) -> Path:
        """`path` of the host's /dev/shm."""
        return Path(f"/proc/{self._keeper.pid}/root{path}")

    def runs(self) -> list[Path]:
        folder = self.seen_from_here(f"/dev/shm/async-ckpt-{os.getuid()}")
        return [path for path in folder.glob("*-*") if path.is_dir()] if folder.exists() else []

    def stop(self) -> None:
        if self.saver.process.poll() is None:
            self.saver.process.terminate()
            self.saver.process.wait(30)
        self._keeper.kill()
        self._keeper.wait()

    def _device(self, pid: int) -> int:
        try:
            return os.stat(f"/proc/{pid}/root/dev/shm").st_dev
        except FileNotFoundError:
            return os.stat("/dev/shm").st_dev


FILE = plan_file("adapter_model.safetensors", [TensorSpec(name, "F32", (ROWS, COLUMNS)) for name in ("a", "b")])
LAYOUT = Layout((ImageFile(FILE.path, FILE.header, FILE.total_bytes),), {"README.md": b"read me"})


def content(step: int) -> bytes:
    """The file of a step."""
    return FILE.header + random.Random(step).randbytes(FILE.total_bytes - len(FILE.header))


class Rank:
    """One rank of `world`: a process that lives, and what it would say."""

    def __init__(
        self, host: Host, rank: int, world: int, directory: Path, *, timeout_s: float = 60.0, **options: Any
    ) -> None:
        self.host, self.rank, self.world, self.directory = host, rank, world, directory
        self._options = Options(str(directory), world, 2, Policy(), timeout_s, **options)
        self._seq = 0
        self._child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
        self.peer = Peer(host.endpoint)
        self.granted: Granted | None = None

    def lead(self, address: str = "127.0.0.1:0", *, plain: bool = False) -> Lead:
        """Asks its saver to lead; what the others need."""
        public, secret = (b"", b"") if plain else zmq.curve_keypair()
        self.peer.say(LeadWanted(address=address, allow=public, plain=plain))
        opened = self.peer.hear(LeadOpen)
        return Lead(endpoint=opened.endpoint, server_key=opened.server_key, public_key=public, secret_key=secret)

    def register(self, lead: Lead | None = None, *, job: str = "job", layout_hash: str = "h") -> None:
        rows = ROWS // self.world
        size = rows if self.rank < self.world - 1 else ROWS - rows * (self.world - 1)
        regions = [Claim(0, n, Region(False, (self.rank * rows, 0), (size, COLUMNS))) for n in (0, 1)]
        self._claims = pack_claims([FILE], regions)[0]
        self.peer.say(
            Register(
                protocol=PROTOCOL,
                options=self._options,
                job=job,
                rank=self.rank,
                process=process_of(self._child.pid),
                launcher=None,
                shm=self.host.shm,
                layout_hash=layout_hash,
                layout=LAYOUT if self.rank == 0 else None,
                claims=self._claims,
                versions={},
                lead=lead,
            )
        )

    def ready(self) -> None:
        self.granted = self.peer.hear(Granted)
        self.peer.say(Ready())

    def refused(self) -> str:
        """Why it cannot attach, which it may hear at first, or when it is ready."""
        return self.peer.hear(Refused).reason

    def slot(self, number: int) -> SlotPaths:
        assert self.granted is not None
        return SlotPaths(self.host.seen_from_here(self.granted.run), number)

    def stage(self, step: int, slot: int = 0, *, say: bool = True) -> None:
        """Into shared memory, as a rank does it, and its word of it."""
        assert self.granted is not None
        paths = self.slot(slot)
        state = StateFile(paths.state)
        state.mark(self.rank, Phase.WRITING, step)
        whole = content(step)
        with (paths.image / FILE.path).open("r+b") as file:
            for span in spans_of([FILE], self._claims, self.granted.owned):
                os.pwrite(file.fileno(), whole[span.start : span.stop], span.start)
        documents = {f"training_state/rank-{self.rank}.json": b"%d" % step}
        paths.write_record(self.rank, SaveRecord(step, {"loss": 0.5}, None, documents))
        state.mark(self.rank, Phase.STAGED, step, 0.25)
        state.close()
        if say:
            self.say_staged(step, slot)

    def say_staged(self, step: int, slot: int) -> None:
        self._seq += 1
        self.peer.say(Staged(seq=self._seq, slot=slot, step=step, copy_s=0.25))

    def settled(self, step: int, timeout_s: float = 30.0) -> Settled:
        """Asked every second, as the client does it."""
        outcome: list[Settled] = []

        def heard() -> bool:
            self.peer.say(Ping(unsettled=[step]))
            with contextlib.suppress(AssertionError):
                while not outcome:
                    settled = self.peer.hear(Settled, timeout_s=1.0)
                    if settled.step == step:
                        outcome.append(settled)
            return bool(outcome)

        until(heard, f"an outcome of step {step} for rank {self.rank}", timeout_s)
        return outcome[0]

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()

    def close(self) -> None:
        self.kill()
        if self._child.stdin is not None:
            self._child.stdin.close()
        self.peer.__exit__(None, None, None)


def status_of(host: Host) -> list[HostStatus]:
    with Peer(host.endpoint) as peer:
        peer.say(StatusWanted())
        return decode_status(peer.hear(Status).report).hosts


class Job:
    """Ranks on hosts, attached and started. `hosts[i]` is the host of rank i. Relays reach the lead through `wire`."""

    def __init__(
        self, hosts: list[Host], directory: Path, *, plain: bool = False, job: str = "job", timeout_s: float = 60.0,
        **options: Any,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.ranks = [
            Rank(host, n, len(hosts), directory, timeout_s=timeout_s, **options) for n, host in enumerate(hosts)
        ]
        self.lead = self.ranks[0].lead(plain=plain)
        self.wire = Wire(self.lead.endpoint)
        self.through = msgspec.structs.replace(self.lead, endpoint=self.wire.endpoint)
        for rank in self.ranks:
            rank.register(None if rank.host is hosts[0] else self.through, job=job)

    def start(self) -> Job:
        for rank in self.ranks:
            rank.ready()
        self.started = [rank.peer.hear(Started) for rank in self.ranks]
        return self

    def committed(self, step: int) -> None:
        """On every rank, and byte for byte."""
        for rank in self.ranks:
            settled = rank.settled(step)
            assert (settled.outcome, settled.reason) == ("committed", "")
        path = self.directory / f"checkpoint-{step}"
        assert (path / FILE.path).read_bytes() == content(step)
        assert (path / "README.md").read_bytes() == b"read me"
        for rank in self.ranks:
            assert (path / f"training_state/rank-{rank.rank}.json").read_bytes() == b"%d" % step

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.wire.close()


@contextlib.contextmanager
def hosts(
    folder: Path, root: Path, names: str = "ab", *, lease_s: float = 30.0, small: int | None = None, direct: str = "",
    envs: Mapping[str, dict[str, str]] | None = None,
) -> Iterator[list[Host]]:  # fmt: skip
    """The first one is to be the lead. `small`: the number of one whose /dev/shm holds no image. `direct`: the names of
    those with --shared-fs direct. `envs`: variables of some of their savers, by name."""
    made: list[Host] = []
    try:
        for number, name in enumerate(names):
            made.append(Host(name, folder, root, lease_s=lease_s, size="2m" if number == small else "50%",
                             options=["--shared-fs", "direct"] if name in direct else [],
                             env=(envs or {}).get(name)))  # fmt: skip
        yield made
    finally:
        for host in made:
            host.stop()
