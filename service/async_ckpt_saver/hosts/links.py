"""All links of one saver, in both directions: it may lead some jobs and relay others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import zmq

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.keys import KeyPair
from async_ckpt.core.private import private_directory, read_capped, write_private
from async_ckpt.core.protocol import FromSaver, Lead, LeadOpen, LeadWanted, Refused, decode_stored
from async_ckpt.core.slots import links_path, shm_identity

from ..hub import Hub
from ..services import Services
from ..status import HostStatus
from .copy_keeper import Way
from .dialler import Dialler, LinkEvents
from .lane import Payload
from .link_words import Said
from .listener import KeyRing, LinkRecord, Listener
from .reception import Reception
from .sessions import Session, Sessions

log = logging.getLogger(__name__)

MAX_LISTENERS = 16
MAX_KEYS = 1024  # of those that may connect, on one listener: the oldest is forgotten for the newest
_RECORD_BYTES = 1 << 20
_NEW_S = 20.0  # how long a listener is kept for a rank that has asked for it and has not registered


@dataclass
class _Open:
    """`listed` are the keys of the saver's own list; `asked` those that ranks brought, oldest first."""

    record: LinkRecord
    listener: Listener
    ring: KeyRing
    sessions: Sessions
    since_s: float
    asked: list[bytes] = field(default_factory=list)


class Links:
    """`own`, `listed`: the saver's own pair and the keys that it allows, if it was given some (`--curve-secret`,
    `--curve-allow`); else each listener makes a pair."""

    def __init__(
        self, services: Services, hub: Hub, loop: asyncio.AbstractEventLoop, own: KeyPair | None, listed: set[bytes]
    ) -> None:
        self._services, self._hub, self._loop = services, hub, loop
        self._own, self._listed = own, listed
        self._open: dict[tuple[str, bool], _Open] = {}
        self._reception = Reception(services, hub)
        self._path = links_path(services.endpoint)

    @property
    def quiet(self) -> bool:
        """Nobody has asked for a listener just now."""
        now_s = self._services.now_s()
        return all(now_s - each.since_s > _NEW_S for each in self._open.values())

    def dial(self, lead: Lead, events: LinkEvents) -> Dialler:
        return Dialler(
            lead,
            shm_identity(),
            socket.gethostname(),
            self._loop,
            events,
            self._services.now_s,
            direct=self._services.direct,
        )

    def tell(self, identity: bytes, message: FromSaver) -> bool:
        return self._reception.tell(identity, message)

    def way_of(self, identity: bytes) -> Way | None:
        return self._reception.way_of(identity)

    def relays_of(self, identities: Iterable[bytes]) -> Mapping[bytes, Session]:
        return self._reception.relays_of(identities)

    def hosts(self) -> list[HostStatus]:
        return self._reception.hosts([each.sessions for each in self._open.values()])

    def want(self, identity: bytes, message: LeadWanted) -> None:
        """Answer a rank that asks this saver to be the lead."""
        try:
            if not message.plain and not message.allow and not self._listed:
                raise CheckpointError("no key was named that the other hosts' savers would show")
            opened = self._listening(message)
            self._allow(opened, message.allow)
        except (CheckpointError, OSError) as error:
            self._services.send(identity, Refused(reason=str(error)))
            return
        endpoint, server_key = opened.listener.endpoint, opened.record.public
        self._services.send(identity, LeadOpen(endpoint=endpoint, server_key=server_key))

    def adopt(self) -> None:
        """Open again what an earlier saver on this endpoint had open, on the same ports and with the same keys."""
        try:
            records = decode_stored(read_capped(self._path, _RECORD_BYTES), list[LinkRecord])
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            log.error("%s cannot be read, so no relay can come back: %s", self._path, error)
            return
        for record in records:
            keys = KeyPair(record.public, record.secret) if record.public else None
            try:
                opened = self._listen(record.endpoint.removeprefix("tcp://"), keys, record)
            except CheckpointError as error:
                log.error("no relay can come back: %s", error)
                continue
            for key in record.allowed:
                self._allow(opened, key)

    def tick(self) -> None:
        for each in self._open.values():
            each.listener.look()
        self._reception.tick([each.sessions for each in self._open.values()])

    def close(self, *, for_good: bool) -> None:
        """`for_good`: no run is left that a later saver would go on with."""
        for each in self._open.values():
            each.listener.close()
        self._open.clear()
        if for_good:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _listening(self, message: LeadWanted) -> _Open:
        opened = self._open.get((message.address, message.plain))
        if opened is not None:
            return opened
        if len(self._open) >= MAX_LISTENERS:
            raise CheckpointError(f"this saver listens on {len(self._open)} addresses for other hosts already")
        keys = None
        if not message.plain:
            keys = self._own or KeyPair(*zmq.curve_keypair())
        record = LinkRecord(message.address, "", keys.public if keys else b"", keys.secret if keys else b"", [])
        return self._listen(message.address, keys, record)

    def _listen(self, address: str, keys: KeyPair | None, record: LinkRecord) -> _Open:
        ring = KeyRing(set(self._listed))

        def frames(routing: bytes, word: bytes | memoryview, payload: Sequence[memoryview]) -> None:
            sessions.hear(routing, word, payload)

        def send(routing: bytes, word: bytes, payload: Payload | None) -> None:
            listener.send(routing, word, payload)

        def on_word(session: Session, word: Said, payload: Sequence[memoryview]) -> None:
            self._reception.word(sessions, session, word, payload)

        sessions = Sessions(
            self._services.incarnation,
            self._services.now_s,
            self._services.rejections,
            send,
            on_word,
            encrypted=keys is not None,
        )
        listener = Listener(self._loop, self._services.rejections, frames, sessions.settle_up)
        endpoint = listener.open(address, keys, ring)
        record = msgspec.structs.replace(record, endpoint=endpoint)
        opened = _Open(record, listener, ring, sessions, self._services.now_s())
        self._open[record.asked, keys is None] = opened
        log.info("listening for the savers of other hosts on %s%s", endpoint, "" if keys else ", without keys")
        return opened

    def _allow(self, opened: _Open, key: bytes) -> None:
        opened.since_s = self._services.now_s()
        if key and key not in opened.asked:
            opened.asked.append(key)
            del opened.asked[:-MAX_KEYS]
            opened.ring.allowed = self._listed | set(opened.asked)
        opened.record = msgspec.structs.replace(opened.record, allowed=list(opened.asked))
        self._note()

    def _note(self) -> None:
        """For the saver after this one. Whatever else is in shared memory may just be going."""
        private_directory(self._path.parent)
        records = [each.record for each in self._open.values()]
        temporary = self._path.with_name(self._path.name + ".tmp")
        write_private(temporary, msgspec.msgpack.encode(records))
        temporary.replace(self._path)
