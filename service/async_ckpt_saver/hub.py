"""All runs of one saver. Knows no sockets: `receive` takes what a rank said, `Services.send` takes the answer."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Hashable
from typing import TYPE_CHECKING

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_IDENTITIES, MAX_REASON_CHARS, MAX_REGISTRATIONS, MAX_RUNS
from async_ckpt.core.location import location_of
from async_ckpt.core.protocol import (
    Ack,
    Bye,
    FromRank,
    Lead,
    Options,
    Ping,
    Pong,
    Refuse,
    Refused,
    Register,
    Status,
    StatusWanted,
)
from async_ckpt.core.slots import RunRecord, copy_paths, read_journals, shm_identity

from . import __version__
from .hosts.shares import host_of
from .memory import no_collections
from .rejections import Cause
from .services import Services
from .status import SaverStatus, encode_status, process_memory_bytes, wall_clock_s
from .watch import ProcessWatch

if TYPE_CHECKING:
    from .desk import Desk
    from .hosts.relay_desk import RelayDesk
    from .image import RunImage
    from .live import LiveRun
    from .uploaders import Uploaders

log = logging.getLogger(__name__)

_OF_ANYBODY = (StatusWanted, Register, Refuse)  # `|` makes a new object for each message


class Hub:
    """Sends each message to the desk of its directory, and each death to the desk that it concerns."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._watch = ProcessWatch(services.loop, services.now_s, self._process_gone, lease_s=services.lease_s)
        self._desks: dict[str, Desk | RelayDesk] = {}
        self._places: dict[bytes, Desk | RelayDesk] = {}
        self._hosts: dict[bytes, str] = {}  # where ranks are that relays speak for

    def adopt(self) -> None:
        """Go on with what an earlier saver on this endpoint left: commit what is complete, wait for living ranks, and
        upload what is not in its second tier yet."""
        if copy_paths(self._services.endpoint):
            self._services.copies.adopt()
        for options in self._services.unfinished.found() if self._services.unfinished is not None else ():
            self._take_up(options)
        if next(read_journals(self._services.endpoint), None) is None:
            return
        from .image import RunImage

        images, unstarted = RunImage.left_behind(self._services.endpoint)
        for image in images:
            try:
                self._adopt(image)
            except Exception:  # one run that cannot be gone on with must not keep the saver from all the others
                log.exception("run %s of %s is left as it is", image.path, image.directory)
        for record in unstarted:
            self._expect(record)

    @property
    def quiet(self) -> bool:
        """Nothing registers, lives or is kept, and nothing is being written."""
        copies = self._services.copies_if_any
        idle = not self._services.tasks and (copies is None or copies.quiet)
        return idle and all(desk.empty for desk in self._desks.values())

    @property
    def serving(self) -> bool:
        """Ranks are alive, or attaching: they may still have something to save."""
        return any(desk.serving for desk in self._desks.values())

    @property
    def uploading(self) -> bool:
        return not all(each.idle for each in self._uploaders())

    async def drain(self) -> None:
        """Finish the commits under way. Runs stay in shared memory for the next saver on this endpoint, and uploads
        are left to it."""
        for each in self._uploaders():
            await each.close()
        if self._services.copies_if_any is not None:
            self._services.copies.close()
        if self._services.parts_if_any is not None:
            self._services.parts.leave_soon()
        await self._services.drain()
        for desk in self._desks.values():
            desk.close()
        self._watch.close()

    def tick(self) -> None:
        self._services.clock.tick()
        self._watch.check_leases()
        for desk in list(self._desks.values()):
            desk.tick()
            if desk.empty:
                desk.close()
                del self._desks[desk.key]
        if self._services.copies_if_any is not None:
            self._services.copies.tick({desk.directory for desk in self._desks.values() if desk.serving})
        self._places = {identity: desk for identity, desk in self._places.items() if desk.knows(identity)}
        self._hosts = {identity: host for identity, host in self._hosts.items() if identity in self._places}

    def receive(self, identity: bytes, message: FromRank) -> None:
        if isinstance(message, _OF_ANYBODY):
            if isinstance(message, StatusWanted):
                self._services.send(identity, Status(report=encode_status(self.status())))
            else:
                self._admit(identity, message)
            return
        self._watch.seen(identity)
        desk = self._places.get(identity)
        if desk is not None and desk.receive(identity, message):
            return
        if isinstance(message, Bye):  # its run has ended: the goodbye is all that was missing
            self._services.send(identity, Ack(seq=message.seq))
        elif not isinstance(message, Ping):  # as after a restart of the saver, when a run had not started
            self._services.rejections.count("unexpected", f"a {type(message).__name__} of nobody who is registered")
        self._services.send(identity, Pong(incarnation=self._services.incarnation, known=False))
        self._services.loop.call_soon(_get_ready)

    # --- ranks of other hosts, for whom a relay speaks -------------------------------------------------------------

    def knows(self, identity: bytes) -> bool:
        desk = self._places.get(identity)
        return desk is not None and desk.knows(identity)

    def host_of(self, identity: bytes) -> str | None:
        """The host from which the rank `identity` has registered through a relay."""
        return self._hosts.get(identity)

    def run_of(self, identity: bytes) -> tuple[LiveRun, int] | None:
        """The run that commits what rank `identity` stages, and its number."""
        from .desk import Desk

        desk = self._places.get(identity)
        run = desk.run_of(identity) if isinstance(desk, Desk) else None
        return None if run is None else (run, run.ranks[identity])

    def seen(self, identity: bytes) -> None:
        self._watch.seen(identity)

    def remote_gone(self, identity: bytes) -> None:
        """Its relay says so."""
        self._watch.discard(identity)
        self._process_gone(identity)

    def status(self) -> SaverStatus:
        services = self._services
        return SaverStatus(
            pid=os.getpid(),
            version=__version__,
            endpoint=services.endpoint,
            root=str(services.roots),
            incarnation=services.incarnation,
            uptime_s=services.loop.time() - services.started_s,
            rss_bytes=process_memory_bytes(),
            rejected_messages={str(cause): count for cause, count in services.rejections.counts.items()},
            now_unix_s=wall_clock_s(),
            runs=[run for desk in self._desks.values() for run in desk.status()],
            ended=[*self._services.ended],
            relayed_bytes=services.relayed_bytes,
            hosts=services.hosts(),
            uploads=[each for uploaders in self._uploaders() for each in uploaders.status()],
        )

    def _admit(self, identity: bytes, message: Register | Refuse) -> None:
        from .desk import Desk  # not before the saver answers: it brings with it all that serves a run

        objection = self._outside(message) or self._stranger(message) or self._too_many(identity, message)
        if objection is not None:
            cause, reason = objection
            self._services.rejections.count(cause, reason)
            self._services.send(identity, Refused(reason=reason))
            return
        desk = self._desk(str(location_of(message.options.directory)), message.lead)
        if isinstance(message, Register):
            self._places[identity] = desk
            if (host := host_of(message.process)) is not None:
                self._hosts[identity] = host
            desk.register(identity, message)
        elif not isinstance(desk, Desk):
            self._places[identity] = desk
            desk.withdraw(identity, message)
        else:
            reason = f"rank {message.rank} cannot take part: {message.reason[:MAX_REASON_CHARS]}"
            desk.withdraw(identity, message.job, message.options.world, reason)

    def _outside(self, message: Register | Refuse) -> tuple[Cause, str] | None:
        if message.lead is not None:
            if self._services.dial is not None:
                return None  # the lead has a root as well, and is the one that writes
            return "unexpected", "this saver relays to nobody"
        options, roots = message.options, self._services.roots
        outside = [each for each in (options.directory, options.upload_to) if each and not roots.covers(each)]
        if not outside:
            return None
        return "unexpected", (
            f"{outside[0]} is outside the root {roots} of the saver at {self._services.endpoint}: "
            f"choose a directory below it, or start the saver with another --root"
        )

    def _stranger(self, message: Register | Refuse) -> tuple[Cause, str] | None:
        """ZeroMQ has let in only who may be let in; what a rank says of itself must fit that."""
        stranger = self._watch.stranger(message.process)
        if stranger is not None:
            return "foreign_user", f"{stranger}: ranks and their saver run as the same user"
        if isinstance(message, Register) and message.shm != shm_identity():
            return "foreign_host", (
                f"rank {message.rank} does not see the /dev/shm of the saver at {self._services.endpoint}: run both on "
                f"one host, and containers with one /dev/shm (docker: --ipc=container:..., Kubernetes: one emptyDir "
                f"with medium: Memory mounted there in both)"
            )
        return None

    def _too_many(self, identity: bytes, message: Register | Refuse) -> tuple[Cause, str] | None:
        if message.options.directory not in self._desks and len(self._desks) >= MAX_RUNS:
            return "limit", f"this saver serves {len(self._desks)} directories already, at most {MAX_RUNS} (MAX_RUNS)"
        registering = sum(desk.registering for directory, desk in self._desks.items()
                          if directory != message.options.directory)  # fmt: skip
        if registering >= MAX_REGISTRATIONS:
            return "limit", (
                f"{registering} other jobs are attaching right now, at most {MAX_REGISTRATIONS} (MAX_REGISTRATIONS): "
                f"try again"
            )
        if identity not in self._places and len(self._places) >= MAX_IDENTITIES:
            return "limit", f"this saver has {len(self._places)} ranks, at most {MAX_IDENTITIES} (MAX_IDENTITIES)"
        return None

    def _process_gone(self, key: Hashable) -> None:
        if isinstance(key, tuple):
            desk = self._desks.get(key[0])
            if desk is not None:
                desk.launcher_gone(key[1])
        elif isinstance(key, bytes) and key in self._places:
            self._places[key].process_gone(key)

    def _uploaders(self) -> list[Uploaders]:
        """Where the ranks of a run have another host's saver, that one uploads."""
        if not self._desks:
            return []
        from .desk import Desk

        return [desk.uploaders for desk in self._desks.values() if isinstance(desk, Desk)]

    def _adopt(self, image: RunImage) -> None:
        lead = image.record.lead
        if lead is not None and self._services.dial is None:
            raise CheckpointError("it is another host's, and this saver relays to nobody")
        if lead is None and not self._services.roots.covers(image.directory):
            raise CheckpointError(f"{image.directory} is outside the root {self._services.roots}")
        log.info("found run %s of %s", image.path, image.directory)
        desk = self._desk(image.directory, lead)
        for peer in image.record.peers:
            self._places[peer.identity] = desk
            if (host := host_of(peer.process)) is not None:
                self._hosts[peer.identity] = host
        desk.adopt(image)

    def _take_up(self, options: Options) -> None:
        try:
            desk = self._desk(str(location_of(options.directory)), None)
        except CheckpointError as error:
            log.error("what was to be uploaded of %s is left where it is: %s", options.directory, error)
            return
        from .desk import Desk

        if isinstance(desk, Desk):
            log.info("goes on with what %s has not uploaded to %s", options.directory, options.upload_to)
            desk.uploaders.take_up(options)

    def _expect(self, record: RunRecord) -> None:
        """Only a relay's lead has to be told who does not come back: here nobody waits for them."""
        if record.lead is None or self._services.dial is None:
            return
        from .hosts.relay_desk import RelayDesk

        desk = self._desk(record.options.directory, record.lead)
        if isinstance(desk, RelayDesk):
            self._places.update((peer.identity, desk) for peer in record.peers)
            desk.expect(record.peers)

    def _desk(self, directory: str, lead: Lead | None) -> Desk | RelayDesk:
        key = directory if lead is None else f"{lead.endpoint} {lead.public_key.hex()} {directory}"
        if key not in self._desks:
            self._desks[key] = self._new_desk(key, directory, lead)
        return self._desks[key]

    def _new_desk(self, key: str, directory: str, lead: Lead | None) -> Desk | RelayDesk:
        if lead is None:
            from .desk import Desk

            return Desk(directory, self._services, self._watch)
        from .hosts.relay_desk import RelayDesk  # few savers ever relay

        return RelayDesk(key, directory, lead, self._services, self._watch)


def _get_ready() -> None:
    """What serves a run takes a while to import. A saver answers before, and does this while whoever has heard it
    prepares a registration."""
    if f"{__package__}.desk" not in sys.modules:
        with no_collections():
            from . import desk  # noqa: F401
