"""A live run: its ranks' messages go through the state machine, and what that asks for is done."""

from __future__ import annotations

import logging
from collections.abc import Callable

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_REASON_CHARS
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
    PromiseWanted,
    Ready,
    Refused,
    Resume,
    Settled,
    Skipped,
    Staged,
    Started,
    StopAfter,
)
from async_ckpt.core.slots import Peer

from .coverage import Ownership
from .early import EarlyWords
from .image import RunImage
from .memory import give_back
from .objection import objection
from .preemption import Action as Word
from .preemption import Agreement, Tell
from .retaining import retain
from .run import Action, Commit, Report, Run
from .services import Services
from .status import Chronicle, RunState, RunStatus, run_status
from .storage import Committed
from .tracing import RunTrace
from .uploader import Uploader
from .writer import CommitResult

log = logging.getLogger(__name__)

_TO_ACKNOWLEDGE = (Skipped, Failed, Bye)  # made once: `|` makes a new object each time


class LiveRun:
    """`ownership` answers the registrations; None for a run that an earlier saver granted. `newest` is asked, in a
    thread, when all ranks are ready. `on_commit` and `on_end` tell the desk; `on_end` comes once, when every rank is
    gone and every complete step is settled; `on_fail` if the run cannot start. `uploader` copies what is committed to
    the run's second tier, if it has one."""

    def __init__(
        self,
        services: Services,
        image: RunImage,
        *,
        ownership: Ownership | None,
        newest: Callable[[], Resume | None],
        on_commit: Callable[[], None],
        on_end: Callable[[], None],
        on_fail: Callable[[str], None],
        uploader: Uploader | None = None,
    ) -> None:
        self.image = image
        self.ranks = {peer.identity: peer.rank for peer in image.record.peers}
        self.launcher_alive = image.record.launcher is not None
        self._services = services
        self._storage = services.storage(image.directory)
        self._parts = services.parts if image.record.hosts_write else None
        self._ownership = ownership
        self._newest = newest
        self._on_commit = on_commit
        self._on_end = on_end
        self._on_fail = on_fail
        self._uploader = uploader
        self._machine = Run(image.record.options.world)
        self._chronicle = Chronicle(services.loop.time, image.record.options.world, lambda: services.on_settled)
        self._trace = RunTrace(lambda traced: self._send(0, traced)) if image.record.trace else None
        self._agreement = Agreement(image.record.options.world)
        self._early: EarlyWords | None = None
        self._ready: set[int] = set()
        self._closed: set[int] = set()
        self._ended = False
        self.abandoned = False

    @property
    def started(self) -> bool:
        return self.image.record.started is not None

    @property
    def clean(self) -> bool:
        """Every rank said goodbye: nobody will come back for the image."""
        return len(self._closed) == self._machine.world

    @property
    def living(self) -> list[Peer]:
        return [peer for peer in self.image.record.peers if not self._machine.gone(peer.rank)]

    def gone(self, rank: int) -> bool:
        return self._machine.gone(rank)

    def outcome(self, step: int) -> Settled | None:
        return self._machine.settled(step)

    def fail(self, reason: str) -> None:
        """It cannot start."""
        self._on_fail(reason)

    def status(self, state: RunState) -> RunStatus:
        return run_status(self.image, self._chronicle, state, self._machine.open_steps, self._machine.gone)

    def grant(self, rank: int) -> None:
        """Answer a registration; one that is repeated after the run has started comes from a confused rank."""
        if self._ownership is None:
            self._send(rank, Refused(reason="this rank's run has started already: attach again"))
            return
        images = [str(slot.image) for slot in self.image.slots]
        verify = self.image.record.options.verify_replicas
        self._send(
            rank,
            Granted(
                run=str(self.image.path),
                slot_directories=images,
                owned=self._ownership.owned[rank],
                replicated=self._ownership.replicated[rank] if verify else [],
            ),
        )

    def recover(self) -> None:
        """Take up what an earlier saver left: the journal is what the ranks had said, the disk what it had done."""
        self._early = EarlyWords(self._machine.world)
        self._services.spawn(self._recover())

    async def _recover(self) -> None:
        known = await self._services.in_thread(self._committed_before, self._storage)
        self._take_up(known)
        early, self._early = self._early, None
        for rank, message in early.kept if early is not None else ():
            if message is None:
                self.died(rank)
            else:
                self.receive(rank, message)
        self._maybe_end()

    def _committed_before(self) -> list[Committed]:
        try:
            self._storage.sweep()  # half a commit, and names that are not durable yet
            return self._storage.committed_by(self.image.path.name)
        except (OSError, CheckpointError) as error:  # found out when a step of it is to be committed
            log.error("%s cannot be read: %s", self.image.directory, error)
            return []

    def _take_up(self, known: list[Committed]) -> None:
        for each in known:
            self._machine.know(Settled(step=each.step, slot=0, outcome="committed", path=each.path, bytes=each.bytes))
        told = [state.settled_step for state in self.image.states]
        self._perform(self._machine.take_up(self.image.staged_cells(), told))

    def receive(self, rank: int, message: FromRank) -> None:
        if self._early is not None and self._early.keep(rank, message):
            return
        senseless = objection(message, started=self.started, slots=len(self.image.slots))
        if senseless is not None:
            self._services.reject(self.image.record.peers[rank].identity, "unexpected", f"rank {rank}: {senseless}")
            return
        self._chronicle.heard(rank, message)
        if self._trace is not None and rank == 0:
            self._trace.heard()
        if isinstance(message, Staged):
            self._staged(rank, message)
        elif isinstance(message, Ping):
            self._answer_ping(rank, message)
        elif isinstance(message, Ready):
            self._rank_ready(rank)
        elif isinstance(message, Skipped | Failed):
            report: Report = "skipped" if isinstance(message, Skipped) else "failed"
            reason = message.reason[:MAX_REASON_CHARS]
            self._catch_up(rank, message.step)
            self._perform(self._machine.report(rank, message.slot, message.step, report, reason))
        elif isinstance(message, Promise):
            self._agree(self._agreement.hear(rank, message.steps, message.stop))
        elif isinstance(message, Bye):
            self._closed.add(rank)
            self._leave(rank, "closed its checkpointer")
        if isinstance(message, _TO_ACKNOWLEDGE):
            self._send(rank, Ack(seq=message.seq))

    def _staged(self, rank: int, message: Staged) -> None:
        machine, step, slot = self._machine, message.step, message.slot
        if self._trace is not None:
            self._trace.step(step).staged(rank)
        self._catch_up(rank, step, but=slot)
        news = machine.awaits(rank, step)
        actions = machine.report(rank, slot, step, "staged")
        if actions:
            self._perform(actions)
        if not news:  # else its outcome will say that it was heard
            self._send(rank, Ack(seq=message.seq))

    def _catch_up(self, rank: int, step: int, but: int | None = None) -> None:
        """What `rank` has staged before `step` is in its cells, those of slot `but` left out, which holds `step`. Its
        word of it may come later, if at all: what was sent to a saver that died is said again, after what was said
        since."""
        machine = self._machine
        for cell in self.image.unheard(rank, step, but, machine.settled):
            if machine.settled(cell.step) is None:
                self._perform(machine.report(rank, cell.slot, cell.step, "staged"))

    def died(self, rank: int) -> None:
        """The kernel says so. Messages of a dead process may be lost: its cells in the journal are what it said."""
        if self._early is not None and self._early.keep(rank, None):
            return
        log.info("rank %d of %s is gone", rank, self.image.directory)
        for cell in self.image.staged_cells(rank):
            self._perform(self._machine.report(rank, cell.slot, cell.step, "staged"))
        self._leave(rank, "died")

    def tell_all(self, message: FromSaver) -> None:
        for identity in self.ranks:
            self._services.send(identity, message)

    def _send(self, rank: int, message: FromSaver) -> None:
        self._services.send(self.image.record.peers[rank].identity, message)

    def _answer_ping(self, rank: int, message: Ping) -> None:
        # A rank whose lease had expired is given up for good, and has to hear so.
        self._send(rank, Pong(incarnation=self._services.incarnation, known=not self._machine.gone(rank)))
        for step in message.unsettled:
            settled = self._machine.settled(step)
            if settled is not None:
                self._send(rank, settled)
        for step in message.not_uploaded if self._uploader is not None else ():
            uploaded = self._uploader.ended(step)  # type: ignore[union-attr]
            if uploaded is not None:
                self._send(rank, uploaded)

    def _rank_ready(self, rank: int) -> None:
        started = self.image.record.started
        if started is not None:
            self._send(rank, started)  # said again, because the answer was lost
            return
        if rank not in self._ready:
            self._ready.add(rank)
            if len(self._ready) == self._machine.world:
                self._services.spawn(self._start())

    async def _start(self) -> None:
        """The same newest checkpoint goes to every rank, so that all of them restore the same one."""
        try:
            resume = await self._services.in_thread(self._newest, self._storage)
            if resume is not None and self.image.record.options.replicas:
                resume = await self._services.spreading.gather(self, resume)
            if self.abandoned:
                return
            started = Started(resume=resume, newest_step=resume.step if resume is not None else None)
            self.image.start(started)
        except (OSError, CheckpointError) as error:
            self._on_fail(f"the run in {self.image.directory} cannot be started: {error}")
            return
        log.info("run %s of %s started, %d ranks", self.image.path, self.image.directory, self._machine.world)
        self.tell_all(started)
        give_back()

    def _leave(self, rank: int, reason: str) -> None:
        if self._parts is not None:
            self._parts.lost(self, rank)
        self._perform(self._machine.leave(rank, reason))
        self._agree(self._agreement.leave(rank))
        self._maybe_end()

    def _agree(self, words: list[Word]) -> None:
        for word in words:
            if not isinstance(word, Tell):
                self._send(word.rank, PromiseWanted())
            elif word.rank is not None:
                self._send(word.rank, StopAfter(steps=word.steps))
            else:
                log.info("preemption of %s: all ranks stop after optimizer step %s", self.image.directory, word.steps)
                self.tell_all(StopAfter(steps=word.steps))

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            self._chronicle.note(action)
            if isinstance(action, Commit):
                self._services.spawn(self._commit(action))
            elif action.rank is not None:
                self._send(action.rank, action.settled)
            else:
                settled = action.settled
                self.image.settle(settled.slot, self._machine.told(settled.slot))
                log.info("step %d of %s: %s %s", settled.step, self.image.directory, settled.outcome, settled.reason)
                self.tell_all(settled)

    async def _commit(self, order: Commit) -> None:
        trace = self._trace.step(order.step) if self._trace is not None else None
        parts = self._parts.begin(self, order) if self._parts is not None else None
        try:
            job = self.image.commit_job(order, parts)
            still_whole = self.image.states[order.slot].complete_step

            def commit() -> CommitResult:
                if trace is None:
                    return self._storage.commit_once(job, lambda: still_whole() == order.step)
                with trace.committing():
                    return self._storage.commit_once(job, lambda: still_whole() == order.step, trace.mark)

            result = await self._services.in_thread(commit, self._storage)
        except Exception as error:  # whatever it is, training and the next save go on
            if parts is not None and parts.left:
                log.info("step %d of %s is left to the next saver: %s", order.step, self.image.directory, error)
                return
            self._chronicle.commit_failed(order.step, error)
            if not isinstance(error, CheckpointError):
                log.exception("commit of step %d failed", order.step)
            if self._parts is not None:
                self._parts.end(self)
            self._perform(self._machine.commit_failed(order.step, str(error) or repr(error)))
        else:
            if self._parts is not None:
                self._parts.end(self)
            if self._uploader is not None:
                self._uploader.add(order.step)
            self._perform(self._machine.commit_done(order.step, result.settled(order.step, order.slot)))
            self._on_commit()
            if self._services.copied(self.image.record.options):
                self._services.spreading.committed(self, order.slot, job, result.path)
            await retain(self._services, self._storage, self._uploader, self.image.record.options.policy, trace)
        if self._trace is not None:
            self._trace.done(order.step)
        self._maybe_end()

    def _maybe_end(self) -> None:
        if self._machine.finished and not self._ended:
            self._ended = True
            if self._services.copied(self.image.record.options):
                self._services.spreading.ended(self)
            self._on_end()
