"""A run of which the lead is on another host: what this host's ranks stage is handed over, and its outcome passed on.

Their cells are the journal here as on any host. A step lies in its slot until its outcome is known, so whatever is
killed or cut off, it is offered again by whoever is there next.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import msgspec
import xxhash

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_RECORD_BYTES, MAX_UNSETTLED
from async_ckpt.core.private import read_capped
from async_ckpt.core.protocol import (
    Ack,
    Bye,
    Failed,
    FromRank,
    FromSaver,
    Granted,
    Ping,
    Pong,
    Promise,
    Ready,
    Refused,
    Settled,
    Skipped,
    Staged,
    Started,
    encode,
)
from async_ckpt.core.slots import Peer, Phase

from ..image import RunImage
from ..memory import give_back
from ..objection import objection
from ..run import Tell as Told
from ..services import Services
from ..status import Chronicle, RunState, RunStatus, run_status
from .dialler import Link
from .link_words import Held, Left, Offer, Piece, Say, Wanted
from .mapped import MappedImages
from .outgoing import Leave, Outgoing, Report, Transfer
from .part_writer import PartWriter
from .relay_image import note_settled
from .shares import read_share
from .spans import Pieces

log = logging.getLogger(__name__)

_REMEMBERED = 64


class RelayRun:
    """`grants` answers registrations, by rank; None for a run that an earlier saver granted. `on_end` comes once, when
    the lead has everything and every rank is gone; `on_fail` if the run cannot start. Raises CheckpointError if what
    the ranks own cannot be read."""

    def __init__(
        self,
        services: Services,
        image: RunImage,
        link: Link,
        *,
        grants: dict[int, Granted] | None,
        on_end: Callable[[], None],
        on_fail: Callable[[str], None],
    ) -> None:
        self.image = image
        self.ranks = {peer.identity: peer.rank for peer in image.record.peers}
        self._peers = {peer.rank: peer for peer in image.record.peers}
        self._services, self._link = services, link
        self._grants, self._on_end, self._on_fail = grants, on_end, on_fail
        self._chronicle = Chronicle(services.loop.time, image.record.options.world, lambda: services.on_settled)
        sizes_bytes = image.sizes_bytes()
        spans = {rank: read_share(image.path, rank, sizes_bytes) for rank in self._peers}
        self._pieces = {rank: Pieces(each) for rank, each in spans.items()}
        self._out = {rank: Outgoing(pieces.count) for rank, pieces in self._pieces.items()}
        self._settled: OrderedDict[int, Settled] = OrderedDict()
        self._leaving: set[int] = set()  # dead, or they said goodbye
        self._over: set[int] = set()  # and the lead knows it, or does not know them any more
        self._mapped = MappedImages(image, writable=False)
        self._ended = False
        self.parts = PartWriter(services, image, link, spans)
        if not image.record.hosts_write:
            services.spawn(
                services.in_thread(lambda: self._mapped.populate([s for each in spans.values() for s in each]))
            )

    @property
    def started(self) -> bool:
        return self.image.record.started is not None

    @property
    def living(self) -> list[Peer]:
        return [peer for peer in self.image.record.peers if peer.rank not in self._leaving]

    @property
    def to_write(self) -> bool:
        """The lead may ask for what was staged here, and nobody else has it."""
        return self.image.record.hosts_write and not all(out.empty for out in self._out.values())

    def status(self, state: RunState) -> RunStatus:
        queue = sorted({step for out in self._out.values() for step in out.steps})
        return run_status(self.image, self._chronicle, state, queue, lambda rank: rank in self._leaving)

    def grant(self, rank: int) -> None:
        if self._grants is None or self.started:
            self._send(rank, Refused(reason="this rank's run has started already: attach again"))
        else:
            self._send(rank, self._grants[rank])

    # --- from ranks --------------------------------------------------------------------------------------------------

    def receive(self, rank: int, message: FromRank) -> None:
        senseless = objection(message, started=self.started, slots=len(self.image.slots))
        if senseless is not None:
            self._services.reject(self._peers[rank].identity, "unexpected", f"rank {rank}: {senseless}")
            return
        self._chronicle.heard(rank, message)
        if isinstance(message, Ping):
            self._answer_ping(rank, message)
        elif isinstance(message, Ready):
            started = self.image.record.started
            if started is not None:
                self._send(rank, started)
            else:
                self._say(rank, message)
        elif isinstance(message, Staged):
            self._send(rank, Ack(seq=message.seq))  # its cell says it as well
            self._catch_up(rank, message.step)
            self._transfer(rank, message)
        elif isinstance(message, Skipped | Failed | Bye) and rank in self._over:
            self._send(rank, Ack(seq=message.seq))
        elif isinstance(message, Skipped | Failed | Bye):
            if isinstance(message, Bye):
                self._leaving.add(rank)
            else:
                self._catch_up(rank, message.step)
            self._out[rank].add(Report(message))
        elif isinstance(message, Promise):
            self._say(rank, message)
        self.pump()

    def died(self, rank: int) -> None:
        """The kernel says so: its cells are what it said."""
        log.info("rank %d of %s is gone", rank, self.image.directory)
        if rank not in self._leaving:  # else its goodbye says it
            self._leaving.add(rank)
            if rank not in self._over:
                self._catch_up(rank, None)
                self._out[rank].add(Leave())
        self._maybe_end()
        self.pump()

    def recover(self) -> None:
        """Take up what an earlier saver left."""
        for rank in self._peers:
            self._catch_up(rank, None)

    def _answer_ping(self, rank: int, message: Ping) -> None:
        known = rank not in self._over or rank in self._leaving
        self._send(rank, Pong(incarnation=self._services.incarnation, known=known))
        unknown = []
        under_way = self._out[rank].steps
        for step in message.unsettled:
            settled = self._settled.get(step)
            if settled is not None:
                self._send(rank, settled)
            elif step not in under_way:
                unknown.append(step)
        if unknown or message.not_uploaded:  # handed over, or settled before this saver was there
            self._say(rank, Ping(unsettled=unknown[:MAX_UNSETTLED], not_uploaded=message.not_uploaded))

    def _catch_up(self, rank: int, before: int | None) -> None:
        """What `rank` has staged (before a step) is in its cells; its word of it may be lost."""
        for cell in self.image.staged_cells(rank):
            if before is None or cell.step < before:
                copy_s = self.image.states[cell.slot].cell(rank).copy_s
                self._transfer(rank, Staged(seq=0, slot=cell.slot, step=cell.step, copy_s=copy_s))

    def _transfer(self, rank: int, staged: Staged) -> None:
        told = self.image.states[staged.slot].settled_step
        if rank not in self._over and staged.step > told and staged.step not in self._settled:
            self._out[rank].add(Transfer(staged))

    # --- from the lead -----------------------------------------------------------------------------------------------

    def hear(self, rank: int, message: FromSaver) -> None:
        """What the lead says to a rank."""
        if isinstance(message, Started):
            self._start(message)
            message = self.image.record.started or message
        elif isinstance(message, Settled):
            self._settle(message)
        elif isinstance(message, Ack):
            if message.seq == 0:  # of a step, which this saver has acknowledged
                return
            if isinstance(self._out[rank].acknowledged(message.seq), Bye):
                self._over.add(rank)
        elif isinstance(message, Pong):
            if message.known:
                return
            self._lost(rank, Pong(incarnation=self._services.incarnation, known=False))
        elif isinstance(message, Refused) and not self.started:
            self._on_fail(message.reason)
            return
        if not isinstance(message, Pong):
            self._send(rank, message)
        self._maybe_end()
        self.pump()

    def transfer_word(self, rank: int, word: Wanted | Held) -> None:
        if isinstance(word, Wanted):
            self._out[rank].wanted(word.step)
        else:
            self._out[rank].over(word.step)
        self._maybe_end()
        self.pump()

    def session_began(self) -> None:
        """The lead knows no more than its journal: say everything again that is not settled."""
        for rank, out in self._out.items():
            out.reset()
            if rank not in self._over:
                self._say(rank, Ping(unsettled=[]))
        self.pump()

    def _start(self, started: Started) -> None:
        if self.started:
            return
        resume = started.resume
        if resume is not None:  # the image is on the lead's host, or a copy of it here
            image = self._services.copies.image_of(self.image.directory, resume.digest)
            started = msgspec.structs.replace(started, resume=msgspec.structs.replace(resume, image=image))
        try:
            self.image.start(started)
        except (OSError, CheckpointError) as error:
            self._on_fail(f"the run in {self.image.directory} cannot be started: {error}")

    def _settle(self, settled: Settled) -> None:
        if settled.step not in self._settled:
            self._chronicle.note(Told(settled))
            self._settled[settled.step] = settled
            while len(self._settled) > _REMEMBERED:
                self._settled.popitem(last=False)
        for out in self._out.values():
            out.over(settled.step)
        self.parts.over(settled.step)
        note_settled(self.image, settled.slot, self._settled)

    def _lost(self, rank: int, answer: FromSaver) -> None:
        """The lead does not know it, or no longer: it has heard of its end, or has given it up."""
        self._out[rank].unknown()
        self._over.add(rank)
        if rank not in self._leaving:
            self._send(rank, answer)

    def give_up(self, reason: str) -> None:
        """The lead goes on without the ranks of this host: what they wait for will not come."""
        if self._over != {*self._peers}:
            log.error("%s: %s", self.image.directory, reason)
        for rank in {*self._peers} - self._over:
            self._lost(rank, Refused(reason=reason))
        self._maybe_end()

    def _maybe_end(self) -> None:
        """Once every rank is gone and the lead has all of them."""
        if self._over & self._leaving >= {*self._peers} and all(out.empty for out in self._out.values()):
            self.end()

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self.parts.over()
            self._mapped.close()
            self._on_end()
            give_back()

    # --- handing over ------------------------------------------------------------------------------------------------

    def pump(self) -> bool:
        """Say what is to be said, and a few pieces. Whether there may be more."""
        if not self._link.open or self._ended:
            return False
        for rank, out in self._out.items():
            item = out.say()
            if isinstance(item, Transfer):
                self._offer(rank, item.staged)
            elif isinstance(item, Report):
                self._say(rank, item.message)
            elif isinstance(item, Leave):
                self._link.say(Left(identity=self._peers[rank].identity))
        more = False
        for rank, out in self._out.items():
            if not self._link.room:
                return True
            piece = out.next_piece()
            if piece is not None:
                self._hand_over(rank, *piece)
                more = True
        return more

    def _offer(self, rank: int, staged: Staged) -> None:
        slot = self.image.slots[staged.slot]
        record: bytes | None = None
        try:
            if slot.read_record(rank).step == staged.step:  # else it is an earlier step's: it wrote none for this one
                record = read_capped(slot.record(rank), MAX_RECORD_BYTES)
        except (OSError, CheckpointError) as error:
            log.debug("rank %d has no record of step %d: %s", rank, staged.step, error)
        self._link.say(Offer(identity=self._peers[rank].identity, slot=staged.slot, step=staged.step,
                             copy_s=max(0.0, staged.copy_s), stall_s=max(0.0, staged.stall_s),
                             record=record))  # fmt: skip

    def _hand_over(self, rank: int, staged: Staged, number: int) -> None:
        cell = self.image.states[staged.slot].cell(rank)
        if cell.phase is not Phase.STAGED or cell.step != staged.step:
            self._out[rank].over(staged.step)  # it has an outcome, or the rank would not have gone on
            return
        parts = [
            self._mapped.view(staged.slot, span.file)[span.start : span.stop] for span in self._pieces[rank].cut(number)
        ]
        payload: memoryview | bytes = parts[0] if len(parts) == 1 else b"".join(parts)
        xxh3 = None if self._link.encrypted else xxhash.xxh3_64_intdigest(payload)
        word = Piece(identity=self._peers[rank].identity, step=staged.step, number=number, xxh3=xxh3)
        self._link.hand_over(word, payload)

    def _say(self, rank: int, message: FromRank) -> None:
        self._link.say(Say(identity=self._peers[rank].identity, payload=encode(message)))

    def _send(self, rank: int, message: FromSaver) -> None:
        self._services.send(self._peers[rank].identity, message)
