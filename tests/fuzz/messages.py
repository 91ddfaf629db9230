"""A hub without a socket, and payloads for it: what the fuzzer starts from and what it calls."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec

from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import (
    Bye,
    Claims,
    Failed,
    FromRank,
    FromSaver,
    LayoutSent,
    Lead,
    LeadWanted,
    Ping,
    Ready,
    Refuse,
    Register,
    Skipped,
    Staged,
    decode_from_rank,
    encode,
)
from async_ckpt.core.slots import read_journals, remove_run
from async_ckpt_saver.hub import Hub
from async_ckpt_saver.services import Services
from tests.saver.saver_process import LAYOUT, register

PEERS = 4


class FuzzedSaver:
    """A Hub whose storage and processes are real; `close` leaves nothing in shared memory."""

    def __init__(self, root: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.endpoint = f"ipc:///nowhere/{secrets.token_hex(6)}"
        self.answers: list[FromSaver] = []
        self.services = Services(endpoint=self.endpoint, root=root, incarnation="fuzz", send=self._send, loop=self.loop)
        self.hub = Hub(self.services)

    def _send(self, identity: bytes, message: FromSaver) -> None:
        encode(message)
        self.answers.append(message)

    def receive(self, identity: bytes, payload: bytes) -> None:
        """As the server does it: what is no message is answered, anything else may raise nothing."""
        try:
            message = decode_from_rank(payload)
        except msgspec.DecodeError as error:
            self.services.reject(identity, "unreadable", str(error))
            return
        self.hub.receive(identity, message)

    def settle(self, seconds: float = 0.0) -> None:
        async def idle() -> None:
            await asyncio.sleep(seconds)
            while self.services.tasks:
                await asyncio.wait(set(self.services.tasks))

        self.loop.run_until_complete(idle())
        self.hub.tick()

    def close(self) -> None:
        self.loop.run_until_complete(self.hub.drain())
        self.loop.close()
        for run, _ in list(read_journals(self.endpoint)):
            remove_run(run)


def real_messages(directory: Path) -> Iterator[FromRank]:
    """One of each kind, and a whole conversation of one rank."""
    me = process_of(os.getpid())
    alone = register(directory)
    pair = msgspec.structs.replace(alone.options, world=2)
    yield alone
    yield Ready()
    for seq, slot in ((1, 0), (2, 1)):
        yield Staged(seq=seq, slot=slot, step=seq, copy_s=0.1)
    yield Skipped(seq=3, slot=0, step=3, reason="busy")
    yield Failed(seq=4, slot=1, step=4, reason="no room")
    yield Ping(unsettled=[1, 2, 3], not_uploaded=[1, 4])
    yield Bye(seq=5)
    yield LayoutSent(layout=LAYOUT)
    yield Refuse(options=pair, job="other", rank=1, process=me, reason="no adapter")
    first: Register = msgspec.structs.replace(alone, options=pair, job="pair")
    yield first
    yield msgspec.structs.replace(first, rank=1, layout=None, layout_hash="other", claims=Claims(b"", b"", []))
    yield LeadWanted(address="127.0.0.1:0", allow=b"k" * 40)
    yield LeadWanted(address="[::1]:40001", allow=b"", plain=True)
    lead = Lead(endpoint="tcp://127.0.0.1:1", server_key=b"", public_key=b"", secret_key=b"")
    yield msgspec.structs.replace(first, rank=1, job="afar", layout=None, lead=lead)
    yield Refuse(options=pair, job="afar", rank=1, process=me, reason="no adapter", lead=lead)


def joined(payloads: Iterator[tuple[int, bytes]]) -> bytes:
    """A conversation as one input: for each message its peer (1 byte), its length (3 bytes), its payload."""
    return b"".join(bytes([peer]) + len(payload).to_bytes(3, "little") + payload for peer, payload in payloads)


def split(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length = int.from_bytes(data[1:4], "little")
        yield data[0] % PEERS, data[4 : 4 + length]
        data = data[4 + length :]
