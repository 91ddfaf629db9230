"""A rank's conversation with its saver: one thread, one socket, every word repeated until it is acknowledged."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec
import zmq

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_UNSETTLED
from async_ckpt.core.protocol import (
    Ack,
    Bye,
    FromRank,
    FromSaver,
    Granted,
    Layout,
    LayoutSent,
    LayoutWanted,
    Ping,
    Pong,
    Ready,
    Refuse,
    Refused,
    Register,
    Rejected,
    Settled,
    Started,
    Word,
    check_sendable,
    decode_from_saver,
    encode,
)
from async_ckpt.core.transport import Transport

from .connection import Connection, Outbox, Report, Request
from .embedded import EmbeddedSaver
from .pulse import Pulse

if TYPE_CHECKING:
    from async_ckpt.core.keys import ClientKeys

log = logging.getLogger(__name__)

_PING_S = 1.0
_SILENCE_S = 3.0  # after which an embedded saver is looked after
_REACH_S = 30.0  # how long a named saver may take to answer at all: a sidecar may start after the trainer
_GRACE_S = 10.0  # beyond timeout_s, so that the saver's own words on what is missing arrive first
_GOODBYE_S = 5.0

T = TypeVar("T", bound=msgspec.Struct)


class SaverRestarted(CheckpointError):
    """The saver was replaced while a run was being set up: what it had granted is void, register again."""


class Client:
    """Thread-safe. Raises CheckpointError if an embedded saver is wanted and does not come up, or if others could
    listen where `transport` leads."""

    def __init__(self, transport: Transport, embedded: EmbeddedSaver | None, keys: ClientKeys | None = None) -> None:
        self.endpoint = transport.endpoint
        self._transport = transport
        self._unsettled: set[int] = set()
        self.not_uploaded: list[int] = []  # steps whose upload is asked for; at most MAX_UNSETTLED, never changed
        self._embedded = embedded
        self.pulse = Pulse(transport.endpoint, embedded)
        self._on_settled: Callable[[Settled], None] = lambda settled: None
        self._on_lost: Callable[[str], None] = lambda reason: None
        self._on_turn: Callable[[str | None], None] = lambda incarnation: None
        self._on_word: Callable[[Word], None] = lambda word: None
        self._inbox: queue.SimpleQueue[FromRank] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._sequence = 0
        self._lock = threading.Lock()
        self._refused: Refused | None = None  # came when nothing was asked, and answers what is asked next
        self._request: Request | None = None  # asked, not yet sent
        self._pending: Request | None = None  # sent, not yet answered
        self._outbox = Outbox()
        self._incarnation: str | None = None
        self._reached = threading.Event()
        self._started = False
        self._leaving = False
        self._stopped = False
        if embedded is not None:
            embedded.ensure()
        self._denied: str | None = None  # why this saver cannot be talked to
        self._connection = Connection(transport, keys)
        self._thread = threading.Thread(target=self._converse, name="async-ckpt-client", daemon=True)
        self._thread.start()

    # --- from other threads ----------------------------------------------------------------------------------------

    def listen(
        self,
        *,
        on_settled: Callable[[Settled], None],
        on_lost: Callable[[str], None],
        on_turn: Callable[[str | None], None],
        on_word: Callable[[Word], None],
    ) -> None:
        """From now on these are called in the client's thread: `on_settled` at least once for each expected step;
        `on_lost` if the saver says that it no longer knows this run; `on_turn` with the saver's incarnation, once a
        second at least and after each `wake`; `on_word` with what else the saver says."""
        self._on_settled, self._on_lost, self._on_turn, self._on_word = on_settled, on_lost, on_turn, on_word

    def register(self, message: Register, layout: Layout, timeout_s: float) -> Granted:
        """Raises CheckpointError with the saver's reason if it refuses, or if it cannot be reached."""
        check_sendable(message)
        return self.ask(message, Granted, timeout_s, layout)

    def ready(self, timeout_s: float) -> Started:
        """Raises SaverRestarted if what was granted is void, CheckpointError if another rank could not get ready."""
        started = self.ask(Ready(), Started, timeout_s)
        self._started = True
        return started

    def refuse(self, message: Refuse, timeout_s: float) -> None:
        """Tell the other ranks why this one cannot take part; they raise the same reason."""
        try:
            self.ask(message, Started, timeout_s)
        except CheckpointError as error:
            log.debug("told the other ranks: %s", error)

    def report(self, make: Callable[[int], Report]) -> None:
        """Queue `make(sequence number)`; it is sent until the saver has acknowledged it."""
        with self._lock:
            self._sequence += 1
            self.post(make(self._sequence))

    def post(self, message: FromRank) -> None:
        """Queue `message`; it may be lost."""
        self._inbox.put(message)
        self.wake()

    def wake(self) -> None:
        """Neither locks nor blocks, so a signal handler may call it."""
        if not self._stopped:
            os.eventfd_write(self._wake_fd, 1)

    def expect(self, step: int) -> None:
        """Ask for the outcome of `step` until `unexpect` is called."""
        with self._lock:
            self._unsettled.add(step)

    def unexpect(self, step: int) -> None:
        with self._lock:
            self._unsettled.discard(step)

    def close(self) -> None:
        """Say goodbye and stop. Never raises, also if called twice: the saver notices when the process ends as well."""
        if self._stopped:
            return
        self._leaving = True
        if self._started and self._thread.is_alive():
            self._outbox.all_acknowledged.clear()
            self.report(lambda seq: Bye(seq=seq))
            if not self._outbox.all_acknowledged.wait(_GOODBYE_S):
                log.debug("the saver at %s did not acknowledge the goodbye", self.endpoint)
        self._stopped = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        os.close(self._wake_fd)

    def ask(self, message: FromRank, answer: type[T], timeout_s: float, layout: Layout | None = None) -> T:
        request = Request(message, answer, layout)
        self._request = request
        self.wake()
        reach_s = min(timeout_s, _REACH_S)
        reached = self._reached.wait(reach_s)
        if self._denied is not None:
            raise CheckpointError(self._denied)
        if not reached:
            if self._embedded is not None and self._embedded.alive():
                raise CheckpointError(f"no answer after {reach_s:g} s: {self.pulse.silence}")
            raise CheckpointError(
                f"no saver answers at {self.endpoint} after {reach_s:g} s{self._connection.hint}: is it running? "
                f"`async-ckpt-saver run --bind {self.endpoint} --root DIR` starts one, or leave out saver= (and "
                f"ASYNC_CKPT_SAVER) to have one started here"
            )
        if not request.answered.wait(timeout_s + _GRACE_S):
            raise CheckpointError(f"the saver at {self.endpoint} did not answer within {timeout_s + _GRACE_S:g} s")
        if request.void:
            raise SaverRestarted(f"the saver at {self.endpoint} was replaced while this rank attached")
        if isinstance(request.answer, Refused):
            raise CheckpointError(request.answer.reason)
        assert isinstance(request.answer, answer)
        return request.answer

    # --- the client's thread ---------------------------------------------------------------------------------------

    def _converse(self) -> None:
        poller = zmq.Poller()
        self._connection.register(poller)
        poller.register(self._wake_fd, zmq.POLLIN)
        try:
            self._loop(poller)
        except Exception as error:  # training goes on without checkpoints, and says so
            log.exception("the conversation with the saver at %s broke", self.endpoint)
            self._on_lost(f"the conversation with the saver broke: {error!r}")
        finally:
            self._connection.close()

    def _loop(self, poller: zmq.Poller) -> None:
        pinged_s = 0.0
        while not self._stopped:
            now_s = time.monotonic()
            if now_s - pinged_s >= (_PING_S if self._reached.is_set() else 0.1):
                pinged_s = now_s
                self._ping()
                self._repeat(now_s)
                if self.pulse.silent(_SILENCE_S):
                    self._look_after_saver()
            ready = dict(poller.poll(1000 if self._reached.is_set() else 100))
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if (denied := self._connection.denied()) is not None:
                self._deny(denied)
            self._on_turn(self._incarnation)
            self._send_inbox()
            if self._connection.socket in ready and self._drain_socket():
                self.pulse.heard()

    def _deny(self, reason: str) -> None:
        log.error("%s", reason)
        self._denied = reason
        self._reached.set()

    def _say_again(self, pending: Request, pong: Pong) -> None:
        """To a new incarnation. It knows what is in a journal; of a run that had not started there is none."""
        if isinstance(pending.message, Ready) and not pong.known:
            pending.void = True
            self._pending = None
            pending.answered.set()
        else:
            self._send(pending.message)

    def _ping(self) -> None:
        with self._lock:
            unsettled = sorted(self._unsettled)[:MAX_UNSETTLED]
        self.pulse.pinged()
        self._send(Ping(unsettled=unsettled, not_uploaded=self.not_uploaded))

    def _send(self, message: FromRank) -> None:
        self._connection.send(encode(message))

    def _send_inbox(self) -> None:
        request = self._request
        if request is not None and self._incarnation is not None and not request.answered.is_set():
            self._request = None
            self._pending = request
            if self._refused is not None and isinstance(request.message, Ready):
                self._receive(self._refused)
            else:
                self._send(request.message)
            self._refused = None
        while not self._inbox.empty():
            message = self._inbox.get()
            payload = encode(message)
            if isinstance(message, Report):
                if isinstance(message, Bye):  # heard twice, what is not settled yet is acknowledged at once
                    self._repeat(time.monotonic(), all_of_them=True)
                self._outbox.add(message, payload)
            self._connection.send(payload)

    def _repeat(self, now_s: float, *, all_of_them: bool = False) -> None:
        for payload in self._outbox.due(now_s, all_of_them=all_of_them):
            self._connection.send(payload)

    def _look_after_saver(self) -> None:
        if self._embedded is None or self._embedded.alive():
            self.pulse.warn_of_silence()
            return
        if self._leaving and not self._unsettled:
            self._outbox.clear()  # it has ended because everyone has left
            return
        log.warning("the embedded saver is gone, killed by somebody or by the kernel for want of memory (see `dmesg`); "
                    "starting another (log: %s)", self._embedded.log_path)  # fmt: skip
        try:
            self._embedded.ensure()
        except CheckpointError as error:
            log.error("%s", error)

    def _drain_socket(self) -> bool:
        heard = False
        while True:
            try:
                payload = self._connection.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return heard
            heard = True
            try:
                self._receive(decode_from_saver(payload))
            except msgspec.DecodeError as error:
                log.error("the saver at %s sent a message that cannot be read: %s", self.endpoint, error)

    def _receive(self, message: FromSaver) -> None:
        if isinstance(message, Pong):
            self._meet(message)
        elif isinstance(message, Ack):
            self._outbox.acknowledged(message.seq)
        elif isinstance(message, Settled):
            self._outbox.settled(message.step)
            self._on_settled(message)
        elif isinstance(message, Rejected) and self._pending is not None:
            self._receive(Refused(reason=message.reason))
        elif isinstance(message, Rejected):
            log.error("the saver at %s understood nothing of a message: %s", self.endpoint, message.reason)
        elif isinstance(message, Word):
            self._on_word(message)
        elif isinstance(message, LayoutWanted):
            if self._pending is not None and self._pending.layout is not None:
                self._send(LayoutSent(layout=self._pending.layout))
        elif self._pending is not None and isinstance(message, Refused | self._pending.expected):
            self._pending.answer = message
            self._pending.answered.set()
            self._pending = None
        elif isinstance(message, Refused) and self._started:
            self._on_lost(message.reason)
        elif isinstance(message, Refused):
            self._refused = message

    def _meet(self, pong: Pong) -> None:
        """A new incarnation knows what the journal says; what was on its way to the old one is said again."""
        if pong.incarnation != self._incarnation:
            try:
                self._transport.check_saver()
            except CheckpointError as error:
                self._deny(str(error))
                return
            self._incarnation = pong.incarnation
            if self._pending is not None:
                self._say_again(self._pending, pong)
            self._repeat(time.monotonic(), all_of_them=True)
            self._reached.set()
            self._send_inbox()
        elif not pong.known and self._pending is not None and isinstance(self._pending.message, Ready):
            self._say_again(self._pending, pong)
        elif not pong.known and self._started and not self._leaving:
            self._on_lost(f"the saver at {self.endpoint} no longer knows this run")
