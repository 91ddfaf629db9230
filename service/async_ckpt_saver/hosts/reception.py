"""A lead's side of its links: what relays say for their ranks goes to the hub, what the hub says to those ranks goes
to their relays."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_IDENTITIES
from async_ckpt.core.protocol import (
    Failed,
    FromSaver,
    Granted,
    LeadWanted,
    Ping,
    Ready,
    Refuse,
    Register,
    Rejected,
    Staged,
    StatusWanted,
    decode_from_rank,
    encode,
)
from async_ckpt.core.slots import shm_identity

from ..hub import Hub
from ..live import LiveRun
from ..memory import give_back
from ..rejections import Cause
from ..services import Services
from ..status import HostStatus
from .link_words import (
    Copied,
    CopyFailed,
    CopyHeld,
    Held,
    Left,
    OfCopies,
    Offer,
    Opened,
    PartFailed,
    PartWritten,
    Piece,
    Said,
    Say,
    Share,
    Tell,
    Wanted,
)
from .remote import RemoteRank, SenselessError
from .sessions import Session, Sessions, SessionWay
from .shares import as_remote, host_of, read_layout, read_share
from .spans import pack
from .spreading import keeper_of

log = logging.getLogger(__name__)


class Reception:
    """`tell` has the first word on everything that a saver says to a rank."""

    def __init__(self, services: Services, hub: Hub) -> None:
        self._services = services
        self._hub = hub
        self._sessions: dict[bytes, tuple[Sessions, Session]] = {}  # by the rank's identity
        self._ranks: dict[bytes, RemoteRank] = {}
        self._ticked_s = services.now_s()
        self._ticked_bytes = self._given_back_bytes = 0
        self._shm = shm_identity()

    def tell(self, identity: bytes, message: FromSaver) -> bool:
        """Whether `identity` is a rank of another host."""
        place = self._sessions.get(identity)
        if place is None:
            return False
        sessions, session = place
        if isinstance(message, Granted):
            self._share(sessions, session, identity, message)
        else:
            sessions.say(session, Tell(identity=identity, payload=encode(message)))
        return True

    def word(self, sessions: Sessions, session: Session, word: Said, payload: Sequence[memoryview]) -> None:
        of_a_rank = Say | Offer | Piece | Left | PartWritten | PartFailed
        identity = word.identity if isinstance(word, of_a_rank) else b""
        try:
            if isinstance(word, OfCopies):
                self._copy_word(SessionWay(sessions, session), word)
            elif isinstance(word, Say):
                self._say(sessions, session, word)
            elif not self._bound(sessions, session, identity):
                raise SenselessError(f"a {type(word).__name__} of a rank that is not this relay's")
            elif isinstance(word, Offer):
                self._offer(sessions, session, word)
            elif isinstance(word, Piece):
                self._piece(sessions, session, word, payload)
            elif isinstance(word, PartWritten | PartFailed):
                if (place := self._hub.run_of(identity)) is not None:
                    self._services.parts.answered(*place, SessionWay(sessions, session), word)
            elif isinstance(word, Left):
                self._hub.remote_gone(identity)
                self._hub.receive(identity, Ping(unsettled=[]))
        except (SenselessError, msgspec.DecodeError) as error:
            cause: Cause = "unreadable" if isinstance(error, msgspec.DecodeError) else "unexpected"
            self._services.rejections.count(cause, f"relay {session.name}: {error}")
            sessions.say(session, Tell(identity=identity, payload=encode(Rejected(reason=str(error)))))
            if isinstance(word, Offer):
                sessions.say(session, Held(identity=identity, step=word.step))  # nothing of it is wanted
        except (CheckpointError, OSError) as error:
            log.error("relay %s: %s", session.name, error)
            if isinstance(word, Offer | Piece) and (place := self._hub.run_of(identity)) is not None:
                self._fail(*place, word, str(error))

    def tick(self, sessions: list[Sessions]) -> None:
        """Ranks live as long as their relay is heard."""
        for each in sessions:
            for session in each.all:
                if session.heard_s >= self._ticked_s:
                    for identity in session.identities:
                        self._hub.seen(identity)
            for gone in each.forget_idle():
                self._services.spreading.lost(SessionWay(each, gone))
                for identity in list(gone.identities):
                    self._unbind(identity)
        self._ticked_s = self._services.now_s()
        if self._given_back_bytes < self._ticked_bytes == self._services.relayed_bytes:
            self._given_back_bytes = self._ticked_bytes  # nothing has come for a while
            give_back()
        self._ticked_bytes = self._services.relayed_bytes
        for identity in [identity for identity in self._sessions if not self._hub.knows(identity)]:
            self._unbind(identity)
            self._drop_rank(identity)

    def hosts(self, sessions: list[Sessions]) -> list[HostStatus]:
        now_s = self._services.now_s()
        return [
            HostStatus(
                name=session.name,
                ranks=sum(self._hub.knows(identity) for identity in session.identities),
                relayed_bytes=session.relayed_bytes,
                silent_s=now_s - session.heard_s,
                copy_step=self._services.spreading.copied_step(SessionWay(each, session)),
            )
            for each in sessions
            for session in each.all
        ]

    def relays_of(self, identities: Iterable[bytes]) -> Mapping[bytes, Session]:
        """Who speaks for them; those of this host are left out."""
        return {each: self._sessions[each][1] for each in identities if each in self._sessions}

    def way_of(self, identity: bytes) -> SessionWay | None:
        place = self._sessions.get(identity)
        return None if place is None else SessionWay(*place)

    def _copy_word(self, way: SessionWay, word: OfCopies) -> None:
        if isinstance(word, CopyHeld | CopyFailed):
            self._services.spreading.answered(way, word)
        elif isinstance(word, Copied):
            self._services.copies.word(way, word)

    # --- words of ranks ----------------------------------------------------------------------------------------------

    def _say(self, sessions: Sessions, session: Session, word: Say) -> None:
        message = decode_from_rank(word.payload)
        if isinstance(message, Register | Refuse):
            self._admit(sessions, session, word.identity, message)
            return
        if isinstance(message, Staged | StatusWanted | LeadWanted):
            raise SenselessError(f"a {type(message).__name__} is nothing that is relayed")
        if not self._bound(sessions, session, word.identity):
            if not self._hub.knows(word.identity):  # its run has ended: so it hears
                self._bind(sessions, session, word.identity)
            else:
                raise SenselessError(f"a {type(message).__name__} of a rank that is not this relay's")
        self._hub.receive(word.identity, message)
        rank = self._rank(word.identity) if isinstance(message, Ready) else None
        if rank is not None and not rank.writes_itself:
            self._services.spawn(self._services.in_thread(rank.prepare))

    def _admit(self, sessions: Sessions, session: Session, identity: bytes, message: Register | Refuse) -> None:
        if self._hub.knows(identity) and not self._bound(sessions, session, identity):
            raise SenselessError("a registration of a rank that is another's")
        self._bind(sessions, session, identity)
        process = as_remote(message.process, session.host)
        if isinstance(message, Register):
            message = msgspec.structs.replace(message, process=process, launcher=None, shm=self._shm, lead=None)
        else:
            message = msgspec.structs.replace(message, process=process, lead=None)
        self._hub.receive(identity, message)

    def _bound(self, sessions: Sessions, session: Session, identity: bytes) -> bool:
        """Whether `session` speaks for `identity`: it did before, or its host is that of the rank in the journal."""
        place = self._sessions.get(identity)
        if place is not None and place[1] is session:
            return True
        if self._hub.host_of(identity) != session.host:
            return False
        if place is not None and place[1].number > session.number:
            return False  # its relay was replaced: this was on its way before
        self._bind(sessions, session, identity)
        return True

    def _bind(self, sessions: Sessions, session: Session, identity: bytes) -> None:
        before = self._sessions.get(identity)
        self._unbind(identity)
        if len(self._sessions) >= MAX_IDENTITIES:
            raise SenselessError(f"{len(self._sessions)} ranks of other hosts are known already (MAX_IDENTITIES)")
        self._sessions[identity] = sessions, session
        session.identities.add(identity)
        run = self._hub.run_of(identity)
        if run is not None and (before is None or before[1] is not session):
            self._services.spreading.bound(run[0], session.host, SessionWay(sessions, session))
            self._services.parts.bound(run[0], session.host, SessionWay(sessions, session))

    def _unbind(self, identity: bytes) -> None:
        place = self._sessions.pop(identity, None)
        if place is not None:
            place[1].identities.discard(identity)

    # --- runs and their bytes ----------------------------------------------------------------------------------------

    def _share(self, sessions: Sessions, session: Session, identity: bytes, granted: Granted) -> None:
        place = self._hub.run_of(identity)
        if place is None:
            return
        run, rank = place
        path = Path(granted.run)
        record = run.image.record
        try:
            layout = read_layout(path)
            spans = read_share(path, rank, [file.total_bytes for file in layout.files])
        except CheckpointError as error:
            run.fail(str(error))
            return
        if path.name not in session.opened:
            session.opened.add(path.name)
            keeps = record.options.replicas > 0 and session.host == keeper_of(record.peers)
            ranks = [peer.rank for peer in record.peers if host_of(peer.process) == session.host]
            sessions.say(session, Opened(run=path.name, job=record.job, options=record.options, layout=layout,
                                         versions=record.versions, ranks=ranks, keeps=keeps,
                                         hosts_write=record.hosts_write))  # fmt: skip
        sessions.say(session, Share(identity=identity, run=path.name, rank=rank, owned=granted.owned,
                                    replicated=granted.replicated, spans=pack(spans)))  # fmt: skip

    def _offer(self, sessions: Sessions, session: Session, word: Offer) -> None:
        rank = self._rank(word.identity)
        if rank is None:
            self._hub.receive(word.identity, Ping(unsettled=[word.step]))  # it hears that it is not known
            return
        held = rank.offer(word)
        if held or not rank.writes_itself:  # else its outcome is the answer
            answer = Held if held else Wanted
            sessions.say(session, answer(identity=word.identity, step=word.step))

    def _fail(self, run: LiveRun, rank: int, word: Offer | Piece, reason: str) -> None:
        """Its outcome ends the transfer on both sides."""
        slot = word.slot if isinstance(word, Offer) else 0
        run.receive(rank, Failed(seq=0, slot=slot, step=word.step, reason=reason))

    def _piece(self, sessions: Sessions, session: Session, word: Piece, payload: Sequence[memoryview]) -> None:
        if not payload:
            raise SenselessError(f"piece {word.number} without its bytes")
        rank = self._rank(word.identity)
        if rank is None:
            return
        came_bytes = sum(frame.nbytes for frame in payload)
        session.relayed_bytes += came_bytes
        self._services.relayed_bytes += came_bytes
        if rank.piece(word, payload, proved=sessions.encrypted):
            sessions.say(session, Held(identity=word.identity, step=word.step))

    def _rank(self, identity: bytes) -> RemoteRank | None:
        place = self._hub.run_of(identity)
        if place is None:
            return None
        known = self._ranks.get(identity)
        if known is None or known.run is not place[0]:
            self._drop_rank(identity)
            known = self._ranks[identity] = RemoteRank(*place)
        return known

    def _drop_rank(self, identity: bytes) -> None:
        known = self._ranks.pop(identity, None)
        if known is not None:
            known.close()
