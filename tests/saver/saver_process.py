"""A saver as a process, and peers at its socket that need no torch: honest ones, and some that are not."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import zmq

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.keys import ClientKeys
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import (
    PROTOCOL,
    Claim,
    FromRank,
    FromSaver,
    Granted,
    ImageFile,
    Layout,
    Options,
    Ping,
    Pong,
    Ready,
    Register,
    Started,
    decode_from_saver,
    encode,
)
from async_ckpt.core.region import Region
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import shm_identity
from async_ckpt.core.transport import transport_of
from tests.ranks import ROOT

FILE = plan_file("adapter_model.safetensors", [TensorSpec("w", "F32", (8,))])
LAYOUT = Layout((ImageFile(FILE.path, FILE.header, FILE.total_bytes),), {"README.md": b"read me"})
T = TypeVar("T", bound=msgspec.Struct)


def until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"never: {what}"
        time.sleep(0.005)


def register(directory: Path, *, job: str = "job", **changes: Any) -> Register:
    """The one rank of a run with one tensor of 8 numbers."""
    message = Register(
        protocol=PROTOCOL,
        options=Options(str(directory), 1, 2, Policy(), 60.0),
        job=job,
        rank=0,
        process=process_of(os.getpid()),
        launcher=None,
        shm=shm_identity(),
        layout_hash="h",
        layout=LAYOUT,
        claims=pack_claims([FILE], [Claim(0, 0, Region(False, (0,), (8,)))])[0],
        versions={},
    )
    return msgspec.structs.replace(message, **changes)


class SaverProcess:
    """`async-ckpt-saver run` on `endpoint`; killed, if need be, at the end of the block."""

    def __init__(
        self, endpoint: str, root: Path | str, log: Path, *options: str, env: dict[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.endpoint, self.log = endpoint, log
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "service")]), **(env or {})}
        command = [sys.executable, "-m", "async_ckpt_saver", "run", "--bind", endpoint, "--root", str(root), *options]
        with log.open("ab") as output:
            self.process = subprocess.Popen([*wrapper, *command], stdout=output, stderr=output, env=environment)

    def said(self) -> str:
        return self.log.read_text()

    def up(self) -> SaverProcess:
        mark = f"saver {self.process.pid} serves"
        until(lambda: mark in self.said() or self.process.poll() is not None, "a saver that serves")
        assert self.process.poll() is None, self.said()
        return self

    def rejected(self, cause: str, number: int = 1) -> None:
        until(lambda: f"rejected ({cause}, number {number})" in self.said(), f"{cause}, number {number}: {self.said()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> SaverProcess:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(30)


class Peer:
    """A socket that says what it is told, true or not."""

    def __init__(self, endpoint: str, keys: ClientKeys | None = None, *, trusting: bool = False) -> None:
        self._context = zmq.Context(1)
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.set(zmq.IDENTITY, secrets.token_bytes(16))
        self.socket.set(zmq.LINGER, 0)
        if trusting:
            self.socket.connect(endpoint)
            return
        try:
            transport_of(endpoint).connect(self.socket, keys)
        except CheckpointError:
            self._context.destroy(0)
            raise

    def say(self, message: FromRank) -> None:
        self.socket.send(encode(message))

    def hear(self, kind: type[T], timeout_s: float = 20.0) -> T:
        """The next message of that kind; what else comes is passed over."""
        deadline_s = time.monotonic() + timeout_s
        heard: list[FromSaver] = []
        while time.monotonic() < deadline_s:
            if self.socket.poll(50):
                heard.append(decode_from_saver(self.socket.recv()))
                if isinstance(heard[-1], kind):
                    return heard[-1]
        raise AssertionError(f"no {kind.__name__}, but {heard}")

    def alive(self) -> Pong:
        """The saver answers: it is there, and lets us in."""
        self.say(Ping(unsettled=[]))
        return self.hear(Pong)

    def start(self, directory: Path, **changes: Any) -> Granted:
        self.say(register(directory, **changes))
        granted = self.hear(Granted)
        self.say(Ready())
        self.hear(Started)
        return granted

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(0)
