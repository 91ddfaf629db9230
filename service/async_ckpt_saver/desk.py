"""All that happens to one directory.

    (Register) -> registration --granted--> live --every rank gone--> kept (the newest image, in RAM) -> nothing
                       |                      ^                         |
                       +-- refused            +---- a restarted job ----+

A new job may register while the ranks of the one before it are still dying; it is granted when they are gone. After a
restart of the saver several runs may be found at once: one whose ranks live, and others that have only to be finished.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_REASON_CHARS
from async_ckpt.core.protocol import FromRank, LayoutSent, LayoutWanted, Options, Ping, Pong, Refused, Register, Resume
from async_ckpt.core.slots import Peer, RunRecord

from .coverage import Ownership
from .image import RunImage
from .kept import kept_image
from .live import LiveRun
from .opening import open_image, record_of
from .refusals import Refusals
from .registration import Complete, Grant, Refusal, Registration, Verdict, Want
from .services import Services
from .status import RunStatus
from .tiers import Tiers
from .uploaders import Uploaders
from .watch import ProcessWatch

log = logging.getLogger(__name__)

_CONFLICT_S = 15.0  # how long a new job waits for the processes of the one before it to be gone


class Desk:
    def __init__(self, directory: str, services: Services, watch: ProcessWatch) -> None:
        self.key = self.directory = directory
        self._services = services
        self._watch = watch
        self._registration: Registration | None = None
        self._grant: Grant | None = None
        self._refused = Refusals()
        self._runs: list[LiveRun] = []
        self._kept: LiveRun | None = None
        self._kept_since_s = 0.0
        self.uploaders = Uploaders(services, directory, lambda: self._runs)

    @property
    def empty(self) -> bool:
        return not (self._registration or self._runs or self._kept or self._refused) and self.uploaders.idle

    @property
    def registering(self) -> bool:
        return self._registration is not None

    @property
    def serving(self) -> bool:
        return bool(self._registration or self._runs)

    # --- from the hub ----------------------------------------------------------------------------------------------

    def register(self, identity: bytes, message: Register) -> None:
        run = self.run_of(identity)
        if run is not None:
            if message.rank == run.ranks[identity]:
                run.grant(message.rank)
            else:
                self._services.reject(identity, "unexpected", f"rank {run.ranks[identity]} says it is {message.rank}")
            return
        reason = self._refused.tell(message.job, message.process)
        if reason is not None:
            self._services.send(identity, Refused(reason=reason))
            return
        if self._registration is not None and self._displaces(identity, message):
            earlier = self._registration.members.get(message.rank)
            if earlier is None or earlier.process != message.process:
                self._services.send(identity, Refused(
                    reason=f"another job is attaching to {self.directory} right now: wait until it has ended, "
                           f"or choose another directory"))  # fmt: skip
                return
            self.refuse(f"rank {message.rank} began to attach again")
        elif self._registration is not None and self._registration.identities.get(message.rank) == identity:
            return  # said twice, because the answer takes time
        if self._registration is None:
            self._registration = Registration(message.options, message.job, self._services.now_s())
        self._watch.add(identity, message.process)
        self._judge(self._registration, self._registration.add(identity, message))

    def withdraw(self, identity: bytes, job: str, world: int, reason: str) -> None:
        """A rank that cannot take part says so before, or instead of, being ready."""
        run = self.run_of(identity)
        if run is not None:
            if not run.started:
                self._abandon(run, reason)
            return
        if self._registration is not None and self._registration.job == job:
            self.refuse(reason)
        self._refused.remember(job, reason, world, self._services.now_s(), replace=False)
        self._services.send(identity, Refused(reason=self._refused.tell(job) or reason))

    def receive(self, identity: bytes, message: FromRank) -> bool:
        """False, and nothing has been done, if `identity` is not known here (`knows`)."""
        run, registration = self.run_of(identity), self._registration
        if run is not None:
            run.receive(run.ranks[identity], message)
        elif registration is None or (rank := registration.rank_of(identity)) is None:
            return False
        elif isinstance(message, Ping):
            self._services.send(identity, Pong(incarnation=self._services.incarnation, known=True))
        elif isinstance(message, LayoutSent) and registration.wants_layout(rank):
            self._judge(registration, registration.add_layout(rank, message.layout))
        else:
            self._services.reject(identity, "unexpected", f"a {type(message).__name__} of a rank that is attaching")
        return True

    def knows(self, identity: bytes) -> bool:
        registering = self._registration is not None and self._registration.rank_of(identity) is not None
        return registering or self.run_of(identity) is not None

    def process_gone(self, identity: bytes) -> None:
        run = self.run_of(identity)
        if run is not None:
            rank = run.ranks[identity]
            if run.started:
                run.died(rank)
            else:
                self._abandon(run, f"rank {rank} died while attaching")
        elif self._registration is not None:
            registering = self._registration.rank_of(identity)
            if registering is not None:
                self.refuse(f"rank {registering} died while attaching")

    def launcher_gone(self, run_path: Path) -> None:
        for run in [*self._runs, *([self._kept] if self._kept is not None else [])]:
            if run.image.path == run_path:
                run.launcher_alive = False

    def adopt(self, image: RunImage) -> None:
        """Go on with a run that an earlier saver left in shared memory: its dead ranks are noticed like any other's."""
        self._install(image, None).recover()

    def close(self) -> None:
        """All that is held lies in shared memory."""

    def status(self) -> list[RunStatus]:
        kept = [self._kept.status("kept")] if self._kept is not None else []
        return [*(run.status("live" if run.started else "starting") for run in self._runs), *kept]

    def tick(self) -> None:
        """Once a second: whatever depends on time passing."""
        now_s = self._services.now_s()
        registration = self._registration
        if registration is not None:
            refusal = registration.expire(now_s) if self._grant is None else None
            if refusal is not None:
                self.refuse(refusal.reason)
            elif now_s - registration.since_s > _CONFLICT_S and (others := self._other_jobs(registration)):
                pids = [peer.process.pid for peer in others]
                self.refuse(f"{self.directory} is in use by another job whose ranks are alive (pids {pids}): "
                            f"end it, or choose another directory")  # fmt: skip
        if self._kept is not None:
            expected = self._kept.launcher_alive or self._kept.image.record.options.replicas > 0
            lease_s = self._services.keep_image_s if expected else self._services.orphan_image_s
            if now_s - self._kept_since_s > lease_s:
                self._drop_kept()
        self._refused.expire(now_s)

    # --- registration ----------------------------------------------------------------------------------------------

    def run_of(self, identity: bytes) -> LiveRun | None:
        for run in self._runs:  # asked several times a message
            if identity in run.ranks:
                return run
        return None

    def _displaces(self, identity: bytes, message: Register) -> bool:
        """Whether this is not one more rank of the registration, but somebody in its way."""
        assert self._registration is not None
        if self._registration.job != message.job:
            return True
        return self._registration.identities.get(message.rank, identity) != identity

    def _other_jobs(self, registration: Registration) -> list[Peer]:
        """Living ranks that stand in the way and are not the registering processes themselves, attaching anew. One
        that is silent and cannot be watched may be dead: its lease decides, which is longer than a conflict's time."""
        processes = [member.process for member in registration.members.values()]
        living = [peer for run in self._runs for peer in run.living]
        if any(peer.process in processes for peer in living):
            return []
        return [peer for peer in living if self._watch.surely_alive(peer.identity)]

    def _judge(self, registration: Registration, verdict: Verdict) -> None:
        if isinstance(verdict, Refusal):
            self.refuse(verdict.reason)
        elif isinstance(verdict, Want):
            registration.want_layout(verdict.rank)
            self._services.send(registration.identities[verdict.rank], LayoutWanted())
        elif isinstance(verdict, Complete):
            self._services.spawn(self._conclude(registration))
        elif isinstance(verdict, Grant):
            self._grant = verdict
            self._open_if_free()

    async def _conclude(self, registration: Registration) -> None:
        try:
            verdict = await self._services.in_thread(registration.conclude)
        except Exception as error:  # what one rank sent must not end the saver, nor leave the others waiting
            log.exception("the registration for %s failed", self.directory)
            verdict = Refusal(f"the registration failed: {error!r}")
        if self._registration is registration:
            self._judge(registration, verdict)

    def refuse(self, reason: str) -> None:
        """Every rank that registered is refused now, the others of the same job as they come."""
        registration = self._registration
        if registration is None:
            return
        reason = reason[:MAX_REASON_CHARS]
        log.warning("refused %s: %s", self.directory, reason)
        self._registration = self._grant = None
        untold = registration.options.world - len(registration.identities)
        self._refused.remember(registration.job, reason, untold, self._services.now_s())
        for identity in registration.identities.values():
            self._watch.discard(identity)
            self._services.send(identity, Refused(reason=reason))

    def _open_if_free(self) -> None:
        if self._registration is not None and self._grant is not None and not self._runs:
            self._services.spawn(self._open(self._registration, self._grant))

    async def _open(self, registration: Registration, grant: Grant) -> None:
        """What the machine may refuse: the directory, shared memory."""
        record = record_of(self._services, registration, grant)
        try:
            storage = self._services.storage(self.directory)
            image, undo = await self._services.in_thread(lambda: self._prepare(record, grant, registration), storage)
        except Exception as error:
            if not isinstance(error, CheckpointError):
                log.exception("cannot open a run in %s", self.directory)
            if self._registration is registration:
                self.refuse(str(error) or repr(error))
            return
        if self._registration is not registration:  # a rank died or withdrew in the meantime
            image.remove()
            undo()
            return
        self._registration = self._grant = None
        run = self._install(image, grant.ownership)
        for rank in range(registration.options.world):
            run.grant(rank)

    def _prepare(
        self, record: RunRecord, grant: Grant, registration: Registration
    ) -> tuple[RunImage, Callable[[], None]]:
        undo = self._tiers(record.options).prepare()
        try:
            return open_image(self._services.endpoint, record, grant, registration), undo
        except BaseException:
            undo()
            raise

    # --- live runs, and what is left of them -----------------------------------------------------------------------

    def _install(self, image: RunImage, ownership: Ownership | None) -> LiveRun:
        run = LiveRun(
            self._services,
            image,
            ownership=ownership,
            newest=lambda: self._newest(image.record.options),
            uploader=self.uploaders.of(image.record.options),
            on_commit=self._drop_kept,
            on_end=lambda: self._end(run),
            on_fail=lambda reason: self._abandon(run, reason),
        )
        self._runs.append(run)
        for peer in image.record.peers:
            self._watch.add(peer.identity, peer.process)
        if image.record.launcher is not None:
            self._watch.add((self.directory, image.path), image.record.launcher)
        return run

    def _tiers(self, options: Options) -> Tiers:
        return Tiers(self._services.roots, self.directory, options.upload_to, options.timeout_s)

    def _newest(self, options: Options) -> Resume | None:
        """The newest committed checkpoint, and its image if it is the one that is kept. Runs in a thread."""
        newest = self._tiers(options).newest()
        if newest is None:
            return None
        step, path = newest
        kept = self._kept
        image = kept_image(kept.image, step, path, whole=options.replicas > 0) if kept is not None else None
        return Resume(step, path, image)

    def _abandon(self, run: LiveRun, reason: str) -> None:
        """A granted run that did not come to start."""
        if run not in self._runs:
            return
        log.warning("run %s abandoned: %s", run.image.path, reason)
        self._runs.remove(run)
        run.abandoned = True
        record = run.image.record
        self._refused.remember(record.job, reason, record.options.world, self._services.now_s())
        run.tell_all(Refused(reason=reason))
        self._unwatch(run)
        run.image.remove()
        self._open_if_free()

    def _end(self, run: LiveRun) -> None:
        self._runs.remove(run)
        self.uploaders.run_ended(run.image.record.options)
        newest = None if run.clean else run.image.newest_image()
        self._unwatch(run)
        self._services.ended.append(run.status("ended"))
        log.info("run %s of %s ended%s", run.image.path, self.directory, ", newest image kept" if newest else "")
        if run.clean:
            self._drop_kept()  # the job ended as it should: nobody comes back for an earlier image either
        if newest is None or not self._keep(run, newest[0]):
            run.image.remove()
        else:
            run.image.keep_only(newest[1])
        self._open_if_free()

    def _keep(self, run: LiveRun, step: int) -> bool:
        """Whether the image of `run` takes the place of the one kept so far."""
        kept = self._kept.image.newest_image() if self._kept is not None else None
        if kept is not None and kept[0] > step:
            return False
        self._drop_kept()
        self._kept, self._kept_since_s = run, self._services.now_s()
        if run.launcher_alive and run.image.record.launcher is not None:
            self._watch.add((self.directory, run.image.path), run.image.record.launcher)
        return True

    def _drop_kept(self) -> None:
        if self._kept is not None:
            self._unwatch(self._kept)
            self._kept.image.remove()
            self._kept = None

    def _unwatch(self, run: LiveRun) -> None:
        for identity in run.ranks:
            self._watch.discard(identity)
        self._watch.discard((self.directory, run.image.path))
