"""A saver without its socket, and what its ranks do: real slots, real storage, real processes whose deaths are seen."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import (
    PROTOCOL,
    Claim,
    FromSaver,
    Granted,
    ImageFile,
    Layout,
    Options,
    Process,
    Ready,
    Register,
    SaveRecord,
    Started,
)
from async_ckpt.core.region import Region
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import Phase, SlotPaths, StateFile, read_journals, shm_identity
from async_ckpt_saver.hub import Hub
from async_ckpt_saver.services import Services

FILE = plan_file("adapter_model.safetensors", [TensorSpec("w", "F32", (8,))])
LAYOUT = Layout((ImageFile(FILE.path, FILE.header, FILE.total_bytes),), {"README.md": b"read me"})
ME = process_of(os.getpid())
T = TypeVar("T", bound=msgspec.Struct)


class Sleeper:
    """A process that stands for a rank, and can be killed."""

    def __init__(self) -> None:
        self._child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.process: Process = process_of(self._child.pid)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()


class Bench:
    """One saver and what it said. Every rank's identity is its name."""

    def __init__(self, endpoint: str, root: Path, *, lease_s: float = 30.0) -> None:
        self.endpoint = endpoint
        self.said: list[tuple[bytes, FromSaver]] = []
        self.services = Services(
            endpoint=endpoint,
            root=root,
            incarnation=secrets.token_hex(4),
            send=lambda identity, message: self.said.append((identity, message)),
            loop=asyncio.get_running_loop(),
            lease_s=lease_s,
        )
        self.hub = Hub(self.services)

    def say(self, identity: str, message: Any) -> None:
        self.hub.receive(identity.encode(), message)

    def heard(self, identity: str, kind: type[T]) -> list[T]:
        return [message for who, message in self.said if who == identity.encode() and isinstance(message, kind)]

    async def hear(self, identity: str, kind: type[T], count: int = 1) -> T:
        await self.until(lambda: len(self.heard(identity, kind)) >= count, f"{kind.__name__} for {identity}")
        return self.heard(identity, kind)[count - 1]

    async def until(self, condition: Callable[[], object], what: str) -> None:
        deadline_s = self.services.now_s() + 20
        while not condition():
            assert self.services.now_s() < deadline_s, f"never: {what}; said {self.said}"
            self.hub.tick()
            await asyncio.sleep(0.005)

    async def start(self, directory: Path, names: str, *, job: str = "job", processes: list[Process] | None = None,
                    **options: Any) -> Granted:  # fmt: skip
        world = len(names)
        for rank, name in enumerate(names):
            process = processes[rank] if processes else ME
            self.say(name, register(directory, rank, world, job=job, process=process, **options))
        granted = await self.hear(names[0], Granted)
        for name in names:
            self.say(name, Ready())
        await self.hear(names[-1], Started)
        return granted

    def gone(self) -> bool:
        return self.hub.quiet and not list(read_journals(self.endpoint))


def register(
    directory: Path, rank: int, world: int, *, job: str = "job", process: Process = ME, timeout_s: float = 600.0,
    verify: bool = False,
) -> Register:  # fmt: skip
    share = 8 // world
    return Register(
        protocol=PROTOCOL,
        options=Options(str(directory), world, 2, Policy(), timeout_s, verify),
        job=job,
        rank=rank,
        process=process,
        launcher=None,
        shm=shm_identity(),
        layout_hash="h",
        layout=LAYOUT if rank == 0 else None,
        claims=pack_claims([FILE], [Claim(0, 0, Region(False, (rank * share,), (share,)))])[0],
        versions={"torch": "2"},
    )


def elsewhere(process: Process) -> Process:
    """The same numbers in another pid namespace: they mean nothing here."""
    return msgspec.structs.replace(process, pid_namespace="pid:[1]")


def stage(granted: Granted, rank: int, slot: int, step: int, **record: Any) -> None:
    """What a rank leaves in shared memory, whether or not it can still say so."""
    paths = SlotPaths(Path(granted.run), slot)
    if rank == 0 or record:
        paths.write_record(rank, SaveRecord(step, {"loss": 0.5}, None, {}, **record))
    state = StateFile(paths.state)
    state.mark(rank, Phase.STAGED, step)
    state.close()


def scenario(body: Callable[[str, Path], Awaitable[None]]) -> Callable[[str, Path], None]:
    def test(endpoint: str, tmp_path: Path) -> None:
        async def limited() -> None:
            await asyncio.wait_for(body(endpoint, tmp_path), 60)

        asyncio.run(limited())

    test.__name__ = body.__name__
    test.__doc__ = body.__doc__
    return test
