"""The relays that are connected to a lead, each with its lanes: who a message is from, and what is answered at once.

No sockets: `hear` takes the frames, `Sessions.send` what goes out.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from ..rejections import Rejections
from .lane import Lane, Payload
from .link_words import (
    LINK_PROTOCOL,
    Beat,
    CopyPiece,
    FromLead,
    FromRelay,
    Hello,
    Missing,
    Offer,
    Piece,
    Said,
    Say,
    Stranger,
    Unwelcome,
    Welcome,
    decode_from_relay,
    encode_word,
)

log = logging.getLogger(__name__)

MAX_SESSIONS = 4096
_IDLE_S = 120.0  # after which a relay that said nothing is forgotten; it begins a new session when it comes back


@dataclass(eq=False)
class Session:
    """One relay. `identities` are the ranks that it speaks for, `opened` the runs that it was told of. One that began
    later has a higher `number`. `direct` as in `Hello`."""

    token: bytes
    host: str
    name: str
    heard_s: float
    direct: bool = False
    lanes: dict[int, tuple[bytes, Lane]] = field(default_factory=dict)
    identities: set[bytes] = field(default_factory=set)
    opened: set[str] = field(default_factory=set)
    relayed_bytes: int = 0
    number: int = field(default_factory=itertools.count().__next__)


@dataclass(frozen=True)
class SessionWay:
    """`copy_keeper.Way`, to a relay."""

    sessions: Sessions
    session: Session

    @property
    def name(self) -> str:
        return self.session.name

    def say(self, word: Said) -> None:
        self.sessions.say(self.session, word)

    def hand(self, word: CopyPiece) -> bool:
        return self.sessions.hand(self.session, word)


class Sessions:
    """`on_word(session, word, payload)` gets every word of a rank once and in order, and every piece."""

    def __init__(
        self,
        incarnation: str,
        now_s: Callable[[], float],
        rejections: Rejections,
        send: Callable[[bytes, bytes, Payload | None], None],
        on_word: Callable[[Session, Say | Offer | Piece | Said, Sequence[memoryview]], None],
        *,
        encrypted: bool,
    ) -> None:
        self.encrypted = encrypted
        self._incarnation = incarnation
        self._now_s = now_s
        self._rejections = rejections
        self._send = send
        self._on_word = on_word
        self._sessions: dict[bytes, Session] = {}
        self._places: dict[bytes, tuple[Session, Lane]] = {}
        self._owing: dict[bytes, Lane] = {}

    @property
    def all(self) -> list[Session]:
        return list(self._sessions.values())

    def say(self, session: Session, word: Said) -> None:
        routing, lane = session.lanes[0]
        lane.put(word)
        self._flush(routing, lane)

    def hand(self, session: Session, word: CopyPiece) -> bool:
        """On the first lane for pieces; False if that has no room."""
        routing, lane = session.lanes.get(1, (b"", None))
        if lane is None or not lane.room:
            return False
        lane.put(word)
        self._flush(routing, lane)
        return True

    def hear(self, routing: bytes, data: bytes | memoryview, payload: Sequence[memoryview]) -> None:
        try:
            word = decode_from_relay(data)
        except msgspec.DecodeError as error:
            self._rejections.count("unreadable", f"a word of {len(data)} bytes on a link: {error}")
            return
        if isinstance(word, Hello):
            self._welcome(routing, word)
            return
        place = self._places.get(routing)
        if place is None:
            self._answer(routing, Stranger())
            return
        session, lane = place
        session.heard_s = self._now_s()
        if isinstance(word, Beat):
            self._answer(routing, lane.hear_beat(word))
            self._answer(routing, lane.beat())
            self._owing.pop(routing, None)
        elif isinstance(word, Missing):
            lane.hear_missing(word)
        else:
            self._take(routing, place, word, payload)
        self._flush(routing, lane)

    def settle_up(self) -> None:
        """After some messages: say what has been heard."""
        for routing, lane in self._owing.items():
            if lane.owes_beat:
                self._answer(routing, lane.beat())
        self._owing.clear()

    def forget_idle(self) -> list[Session]:
        """Those whose relay has been silent for long."""
        now_s = self._now_s()
        idle = [session for session in self._sessions.values() if now_s - session.heard_s > _IDLE_S]
        for session in idle:
            del self._sessions[session.token]
            for routing, _ in session.lanes.values():
                self._places.pop(routing, None)
        return idle

    def _take(
        self, routing: bytes, place: tuple[Session, Lane], word: FromRelay, payload: Sequence[memoryview]
    ) -> None:
        session, lane = place
        assert not isinstance(word, Hello | Beat | Missing)
        if 0 not in session.lanes:
            self._answer(routing, Stranger())
        elif lane.hear(word.seq):
            self._owing[routing] = lane
            self._on_word(session, word, payload)
        else:
            self._answer(routing, lane.complaint(word.seq))

    def _welcome(self, routing: bytes, word: Hello) -> None:
        if word.protocol != LINK_PROTOCOL:
            reason = (f"the saver of {word.name} speaks protocol {word.protocol} of links, the lead {LINK_PROTOCOL}: "
                      f"install the same async-ckpt version on all hosts")  # fmt: skip
            self._answer(routing, Unwelcome(reason=reason))
            return
        session = self._sessions.get(word.session)
        if session is None:
            if len(self._sessions) >= MAX_SESSIONS:
                self._rejections.count("limit", f"{len(self._sessions)} relays are connected (MAX_SESSIONS)")
                self._answer(routing, Unwelcome(reason=f"the lead serves {len(self._sessions)} relays already"))
                return
            session = Session(word.session, word.host, word.name, self._now_s(), word.direct)
            self._sessions[word.session] = session
            log.info("relay %s is connected", word.name)
        known = session.lanes.get(word.lane)
        if known is None:
            lane = Lane()
            session.lanes[word.lane] = routing, lane
            self._places[routing] = session, lane
        elif known[0] != routing:
            self._rejections.count("unexpected", f"a second lane {word.lane} of the session of {word.name}")
            return
        session.heard_s = self._now_s()
        self._answer(routing, Welcome(incarnation=self._incarnation))

    def _flush(self, routing: bytes, lane: Lane) -> None:
        for entry in lane.take():
            self._send(routing, entry.word, entry.payload)

    def _answer(self, routing: bytes, word: FromLead | None) -> None:
        if word is not None:
            self._send(routing, encode_word(word), None)
