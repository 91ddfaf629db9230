"""Many simulated ranks in one process: real sockets, real messages, real journal cells; no torch, no tensors.

Started by `scale`: commands come in on stdin, one a line; each is answered by one line of JSON when all ranks are done.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import (
    PROTOCOL,
    Ack,
    Bye,
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
    Refused,
    Register,
    SaveRecord,
    Settled,
    Staged,
    Started,
    decode_from_saver,
    encode,
)
from async_ckpt.core.region import Region
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import Phase, SlotPaths, StateFile, shm_identity

_TIMEOUT_MS = 120_000


class Ranks:
    """Ranks [first, first + count) of `world`, each with an identity and a socket of its own, as FSDP2 shards `tensors`
    tensors of `row_bytes` a rank each."""

    def __init__(self, endpoint: str, directory: str, world: int, first: int, count: int, tensors: int) -> None:
        self._context = zmq.Context(1)
        self._context.set(zmq.MAX_SOCKETS, count + 16)
        self._poller = zmq.Poller()
        self._sockets = []
        self.numbers = range(first, first + count)
        for _ in self.numbers:
            socket = self._context.socket(zmq.DEALER)
            socket.set(zmq.IDENTITY, secrets.token_bytes(16))
            socket.set(zmq.SNDHWM, 0)
            socket.set(zmq.RCVHWM, 0)
            socket.set(zmq.LINGER, 0)
            socket.connect(endpoint)
            self._sockets.append(socket)
        self._layout = plan_file("adapter_model.safetensors", [TensorSpec(f"layer.{number:04}", "BF16", (world, 8))
                                                               for number in range(tensors)])  # fmt: skip
        self._options = Options(directory, world, 2, Policy(keep_last=2), 600.0)
        self._process = process_of(os.getpid())
        self._registrations = [encode(self._register(number)) for number in self.numbers]
        self.sequence = 0

    def _register(self, number: int) -> Register:
        file = self._layout
        claims = [Claim(0, tensor, Region(False, (number, 0), (1, 8))) for tensor in range(len(file.extents))]
        image = Layout((ImageFile(file.path, file.header, file.total_bytes),), {})
        return Register(
            protocol=PROTOCOL,
            options=self._options,
            job="scale",
            rank=number,
            process=self._process,
            launcher=None,
            shm=shm_identity(),
            layout_hash="scale",
            layout=image if number == 0 else None,
            claims=pack_claims([file], claims)[0],
            versions={},
        )

    # --- commands --------------------------------------------------------------------------------------------------

    def hello(self) -> dict[str, float]:
        """Every socket is connected when the saver has answered on it."""
        self._say(lambda number: Ping(unsettled=[]))
        self._hear(Pong)
        return {}

    def register(self) -> dict[str, float]:
        for socket, payload in zip(self._sockets, self._registrations, strict=True):
            socket.send(payload)
        nbytes = sum(map(len, self._registrations))
        self._registrations.clear()
        granted = self._hear(Granted)
        assert isinstance(granted, Granted)
        self._paths = [SlotPaths(Path(granted.run), index) for index in range(len(granted.slot_directories))]
        self._states = [StateFile(paths.state) for paths in self._paths]
        return {"sent_bytes": nbytes, "owned": len(granted.owned)}

    def ready(self) -> dict[str, float]:
        self._say(lambda number: Ready())
        self._hear(Started)
        return {}

    def stage(self, step: int) -> dict[str, float]:
        """The journal as the ranks would leave it."""
        slot = step % len(self._paths)
        if 0 in self.numbers:
            self._paths[slot].write_record(0, SaveRecord(step, {"loss": 1.0}, None, {}))
        for number in self.numbers:
            self._states[slot].mark(number, Phase.STAGED, step)
        return {}

    def save(self, step: int) -> dict[str, float]:
        slot = step % len(self._paths)
        self.sequence += 1
        self._say(lambda number: Staged(seq=self.sequence, slot=slot, step=step, copy_s=0.0))
        settled = self._hear(Settled)
        assert isinstance(settled, Settled)
        assert settled.outcome == "committed", settled
        return {"storage_s": settled.write_s + settled.commit_s}

    def bye(self) -> dict[str, float]:
        self.sequence += 1
        self._say(lambda number: Bye(seq=self.sequence))
        self._hear(Ack)
        return {}

    # --- sockets ---------------------------------------------------------------------------------------------------

    def _say(self, make: Callable[[int], FromRank]) -> None:
        for socket, number in zip(self._sockets, self.numbers, strict=True):
            socket.send(encode(make(number)))

    def _hear(self, kind: type[FromSaver]) -> FromSaver:
        """Wait until every rank has heard a `kind`; the last of them."""
        found: FromSaver | None = None
        for socket in self._sockets:
            while True:
                if not socket.poll(_TIMEOUT_MS):
                    raise TimeoutError(f"no {kind.__name__} within {_TIMEOUT_MS} ms")
                message = decode_from_saver(socket.recv())
                if isinstance(message, kind):
                    found = message
                    break
                if isinstance(message, Refused):
                    raise RuntimeError(message.reason)
        assert found is not None
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoint")
    parser.add_argument("directory")
    for name in ("world", "first", "count", "tensors"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    ranks = Ranks(given.endpoint, given.directory, given.world, given.first, given.count, given.tensors)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        started_s = time.perf_counter()
        answer = getattr(ranks, command)(*map(int, arguments))
        print(json.dumps({"seconds": time.perf_counter() - started_s, **answer}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
