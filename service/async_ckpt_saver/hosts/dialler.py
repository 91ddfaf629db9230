"""A relay's way to its lead: a DEALER for words and some for pieces, each a lane, all together a session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq

from async_ckpt.core.limits import MAX_MESSAGE_BYTES
from async_ckpt.core.protocol import Lead
from async_ckpt.core.transport import HANDSHAKE_MS, next_failure, watch_handshakes

from ..memory import reuse_large_blocks
from .lane import Lane, Payload
from .link_words import (
    LINK_PROTOCOL,
    Beat,
    CopyPiece,
    FromLead,
    FromRelay,
    Hello,
    Missing,
    Piece,
    Said,
    Stranger,
    Unwelcome,
    Welcome,
    decode_from_lead,
    encode_word,
    in_frames,
)

log = logging.getLogger(__name__)

PIECE_LANES = 1
CURVE_PIECE_LANES = 2  # ZeroMQ encrypts a connection in one thread
_TICK_S = 1.0
_AT_A_TURN = 64
_HEARTBEAT_MS = 2000
_SILENT_MS = 10_000
_RECONNECT_MS = 100
_RECONNECT_MAX_MS = 1000


class LinkEvents(Protocol):
    """What a relay does about its link."""

    def link_word(self, word: Said) -> None: ...

    def link_open(self, incarnation: str) -> None:
        """A new session: the lead knows nothing of what was said before but what is in its journal."""

    def link_denied(self, reason: str) -> None:
        """As long as the keys or the versions are what they are, there will be no session."""

    def link_room(self) -> None:
        """There may be room for more pieces."""


class Link(Protocol):
    """A way to the lead. What is said while it is not `open` is not said: `link_open` is the time to say it all."""

    open: bool
    encrypted: bool

    @property
    def name(self) -> str: ...

    @property
    def silent_s(self) -> float: ...

    @property
    def room(self) -> bool: ...

    def say(self, word: Said) -> None: ...

    def hand_over(self, word: Piece, payload: Payload) -> None: ...

    def hand(self, word: CopyPiece) -> bool: ...

    def close(self) -> None: ...


class _End:
    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self.lane = Lane()
        self.welcome = False


class Dialler:
    """`host` and `name` say who we are: `slots.shm_identity`, and for people. `direct` as in `Hello`."""

    def __init__(
        self, lead: Lead, host: str, name: str, loop: asyncio.AbstractEventLoop, events: LinkEvents,
        now_s: Callable[[], float], *, direct: bool = False,
    ) -> None:  # fmt: skip
        self.open = False
        self.encrypted = bool(lead.server_key)
        self._lead, self._host, self._name, self._direct = lead, host, name, direct
        self._loop, self._events, self._now_s = loop, events, now_s
        reuse_large_blocks()
        self._piece_lanes = CURVE_PIECE_LANES if self.encrypted else PIECE_LANES
        self._context = zmq.Context(self._piece_lanes)
        self._ends: list[_End] = []
        self._heard_s = now_s()
        self._next = 0
        self._again = False
        self._closed = False
        self._denied = False
        self._begin()
        self._timer = loop.call_later(_TICK_S, self._tick)

    @property
    def name(self) -> str:
        return self._lead.endpoint

    @property
    def silent_s(self) -> float:
        return self._now_s() - self._heard_s

    @property
    def room(self) -> bool:
        return self.open and any(end.lane.room for end in self._ends[1:])

    def say(self, word: Said) -> None:
        if self.open:
            self._ends[0].lane.put(word)
            self._flush(self._ends[0])

    def hand(self, word: CopyPiece) -> bool:
        """On the first lane for pieces; False if that has no room."""
        if not self.open or not self._ends[1].lane.room:
            return False
        self._ends[1].lane.put(word)
        self._flush(self._ends[1])
        return True

    def hand_over(self, word: Piece, payload: Payload) -> None:
        """Ask for `room` before. The payload must not change as long as the step has no outcome."""
        pieces = self._ends[1:]
        for _ in pieces:
            self._next = (self._next + 1) % len(pieces)
            if pieces[self._next].lane.room:
                break
        pieces[self._next].lane.put(word, payload)
        self._flush(pieces[self._next])

    def close(self) -> None:
        self._closed = True
        self._timer.cancel()
        self._hang_up()
        self._context.destroy(0)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.open = False
        self._hang_up()
        self._session = secrets.token_bytes(16)
        self._incarnation = ""
        for lane in range(1 + self._piece_lanes):
            socket = self._context.socket(zmq.DEALER)
            socket.set(zmq.IDENTITY, self._session + bytes([lane]))
            socket.set(zmq.RCVHWM, 0)
            socket.set(zmq.SNDHWM, 0)
            socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.IPV6, "[" in self._lead.endpoint)
            socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
            socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
            socket.set(zmq.HEARTBEAT_TIMEOUT, _SILENT_MS)
            socket.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
            socket.set(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
            if self._lead.server_key:
                socket.set(zmq.CURVE_SERVERKEY, self._lead.server_key)
                socket.set(zmq.CURVE_PUBLICKEY, self._lead.public_key)
                socket.set(zmq.CURVE_SECRETKEY, self._lead.secret_key)
            if lane == 0:
                self._monitor = watch_handshakes(socket)
            socket.connect(self._lead.endpoint)
            self._ends.append(_End(socket))
            self._loop.add_reader(int(socket.get(zmq.FD)), self._look_again)
        self._greet()
        self._look_again()

    def _hang_up(self) -> None:
        for number, end in enumerate(self._ends):
            self._loop.remove_reader(int(end.socket.get(zmq.FD)))
            if number == 0:
                end.socket.disable_monitor()
                self._monitor.close(0)
            end.socket.close(0)
        self._ends = []

    def _greet(self) -> None:
        for lane, end in enumerate(self._ends):
            if not end.welcome:
                self._send(end, Hello(protocol=LINK_PROTOCOL, session=self._session, lane=lane, host=self._host,
                                      name=self._name, direct=self._direct))  # fmt: skip

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_TICK_S, self._tick)
        if self._denied:
            self._denied = False
            self._begin()
        self._look_at_door()
        if self._closed:
            return
        self._greet()
        for end in self._ends:
            if end.welcome:
                self._send(end, end.lane.beat())
        self._look_again()

    def _look_at_door(self) -> None:
        while (failure := next_failure(self._monitor)) is not None:
            if failure[0] is zmq.Event.HANDSHAKE_FAILED_AUTH:
                self._events.link_denied(
                    f"the lead at {self._lead.endpoint} does not allow this job's key: rank 0 must register it there, "
                    f"or the lead list it (--curve-allow)"
                )
                self._denied = True  # ZeroMQ does not try again, and the lead may be replaced by one that does
                return
            elif failure[0] is not zmq.Event.ACCEPT_FAILED and not self.open:
                log.warning("what listens at %s does not have the lead's key, or speaks without keys (%s)",
                            self._lead.endpoint, failure[0].name)  # fmt: skip
            if self._closed:
                return

    # --- messages ----------------------------------------------------------------------------------------------------

    def _send(self, end: _End, word: FromRelay) -> None:
        with contextlib.suppress(zmq.ZMQError):
            end.socket.send(encode_word(word), zmq.NOBLOCK)

    def _flush(self, end: _End) -> None:
        for entry in end.lane.take():
            with contextlib.suppress(zmq.ZMQError):
                if entry.payload is None:
                    end.socket.send(entry.word, zmq.NOBLOCK)
                else:
                    end.socket.send_multipart([entry.word, *in_frames(entry.payload)], zmq.NOBLOCK, copy=False)
        self._look_again()

    def _look_again(self) -> None:
        if not self._again and not self._closed:
            self._again = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._again = False
        for end in list(self._ends):
            for _ in range(_AT_A_TURN):
                if end.socket.closed:  # by what was heard
                    break
                try:
                    data = end.socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._hear(end, data)
            else:
                self._look_again()
            if not end.socket.closed and end.lane.owes_beat:
                self._send(end, end.lane.beat())
        if self.room:
            self._events.link_room()

    def _hear(self, end: _End, data: bytes) -> None:
        try:
            word: FromLead = decode_from_lead(data)
        except msgspec.DecodeError as error:
            log.error("the lead at %s sent a word that cannot be read: %s", self._lead.endpoint, error)
            return
        self._heard_s = self._now_s()
        if isinstance(word, Welcome):
            self._welcomed(end, word.incarnation)
        elif isinstance(word, Unwelcome):
            self._events.link_denied(word.reason)
        elif isinstance(word, Stranger):
            if end.welcome:
                log.info("the lead at %s does not know this relay any more: a new session", self._lead.endpoint)
                self._begin()
        elif isinstance(word, Beat):
            self._answer(end, end.lane.hear_beat(word))
        elif isinstance(word, Missing):
            end.lane.hear_missing(word)
            self._flush(end)
        elif end.lane.hear(word.seq):
            self._events.link_word(word)
        else:
            self._answer(end, end.lane.complaint(word.seq))

    def _answer(self, end: _End, missing: Missing | None) -> None:
        if missing is not None:
            self._send(end, missing)
        self._flush(end)

    def _welcomed(self, end: _End, incarnation: str) -> None:
        if self._incarnation and incarnation != self._incarnation:
            self._begin()  # the lead was replaced between two lanes
            return
        self._incarnation = incarnation
        end.welcome = True
        if not self.open and all(each.welcome for each in self._ends):
            self.open = True
            log.info("relaying to the lead at %s", self._lead.endpoint)
            self._events.link_open(incarnation)
