"""A rank's socket to its saver, and what is still to be answered or acknowledged over it."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
import zmq

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.protocol import Bye, Failed, FromRank, FromSaver, Layout, Skipped, Staged
from async_ckpt.core.transport import Door, Transport

if TYPE_CHECKING:
    from async_ckpt.core.keys import ClientKeys

log = logging.getLogger(__name__)

_REPEAT_S = 2.0  # after which an unacknowledged message is sent again

Report = Staged | Skipped | Failed | Bye


class Connection:
    """Of one thread. Raises CheckpointError if others could listen where `transport` leads, or if keys are missing."""

    def __init__(self, transport: Transport, keys: ClientKeys | None) -> None:
        self.transport = transport
        self._context = zmq.Context(1)
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.set(zmq.IDENTITY, secrets.token_bytes(16))
        self.socket.set(zmq.SNDHWM, 0)
        self.socket.set(zmq.RCVHWM, 0)
        self.socket.set(zmq.LINGER, 500)
        self.socket.set(zmq.RECONNECT_IVL, 20)
        self._door = Door(self.socket) if transport.encrypted else None
        try:
            transport.connect(self.socket, keys)
        except CheckpointError:
            self.close()
            raise

    @property
    def hint(self) -> str:
        """What may be wrong where nobody answers: goes into an error's first clause."""
        return self._door.hint if self._door is not None else ""

    def register(self, poller: zmq.Poller) -> None:
        poller.register(self.socket, zmq.POLLIN)
        if self._door is not None:
            poller.register(self._door.monitor, zmq.POLLIN)

    def denied(self) -> str | None:
        """Why the saver will never let us in, None as long as it may."""
        return self._door.look() if self._door is not None else None

    def send(self, payload: bytes) -> None:
        try:
            self.socket.send(payload, zmq.NOBLOCK)
        except zmq.Again:
            log.debug("the saver at %s is not connected", self.transport.endpoint)

    def close(self) -> None:
        if self._door is not None:
            self._door.close()
        self.socket.close()
        self._context.term()


class Request:
    """What a rank asks, and the answer when it is there; `void` if the saver was replaced before it came."""

    def __init__(self, message: FromRank, expected: type[msgspec.Struct], layout: Layout | None) -> None:
        self.message = message
        self.expected = expected
        self.layout = layout
        self.answer: FromSaver | None = None
        self.void = False
        self.answered = threading.Event()


class Outbox:
    """Reports that the saver has not acknowledged yet. `all_acknowledged` is for other threads to wait on."""

    def __init__(self) -> None:
        self.all_acknowledged = threading.Event()
        self._waiting: OrderedDict[int, tuple[float, bytes]] = OrderedDict()
        self._staged: dict[int, int] = {}  # step -> the number of the report that it is staged

    def add(self, report: Report, payload: bytes) -> None:
        self._waiting[report.seq] = (time.monotonic(), payload)
        if isinstance(report, Staged):
            self._staged[report.step] = report.seq

    def due(self, now_s: float, *, all_of_them: bool = False) -> Iterator[bytes]:
        """What to say again, in order."""
        for seq, (sent_s, payload) in list(self._waiting.items()):
            if all_of_them or now_s - sent_s >= _REPEAT_S:
                self._waiting[seq] = (now_s, payload)
                yield payload

    def acknowledged(self, seq: int) -> None:
        self._waiting.pop(seq, None)
        if not self._waiting:
            self.all_acknowledged.set()

    def settled(self, step: int) -> None:
        """Its outcome says as well that what was said of it is known."""
        seq = self._staged.pop(step, None)
        if seq is not None:
            self.acknowledged(seq)

    def clear(self) -> None:
        """Nobody is left to acknowledge."""
        self._waiting.clear()
        self._staged.clear()
        self.all_acknowledged.set()
