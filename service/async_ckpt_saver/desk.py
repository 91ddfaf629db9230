"""All that happens to one directory.

    (Register) -> registration --granted--> live --every rank gone--> kept (the newest image, in RAM) -> nothing
                       |                      ^                         |
                       +-- refused            +---- a restarted job ----+

At most one run is live. A new job may register while the ranks of the one before it are still dying; it is granted
when they are gone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from async_ckpt.core import manifest
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.protocol import FromRank, LayoutSent, LayoutWanted, Ping, Pong, Refused, Register, Resume
from async_ckpt.core.slots import Peer, RunRecord

from .image import RunImage
from .live import LiveRun
from .registration import Grant, Refusal, Registration, Verdict, Want
from .services import Services
from .storage import prepare_directory
from .watch import ProcessWatch
from .writer import sweep

log = logging.getLogger(__name__)

_CONFLICT_S = 15.0  # how long a new job waits for the processes of the one before it to be gone
_REMEMBER_REFUSAL_S = 20.0  # how long a refused job's late ranks are waited for


class _RefusedJob(msgspec.Struct):
    reason: str
    since_s: float
    untold: int


class Desk:
    def __init__(self, directory: str, services: Services, watch: ProcessWatch) -> None:
        self.directory = directory
        self._services = services
        self._watch = watch
        self._registration: Registration | None = None
        self._grant: Grant | None = None
        self._refused: dict[str, _RefusedJob] = {}
        self._live: LiveRun | None = None
        self._kept: LiveRun | None = None
        self._kept_since_s = 0.0

    @property
    def empty(self) -> bool:
        return not (self._registration or self._live or self._kept or self._refused)

    # --- from the hub ----------------------------------------------------------------------------------------------

    def register(self, identity: bytes, message: Register) -> None:
        if self._live is not None and identity in self._live.ranks:
            self._live.grant(message.rank)
            return
        if message.job in self._refused:
            self._refuse_late(identity, self._refused[message.job], message.job)
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
        if self._live is not None and self._live.image.record.job == job:
            if not self._live.started:
                self._abandon(self._live, reason)
            return
        if self._registration is not None and self._registration.job == job:
            self.refuse(reason)
        refused = self._refused.setdefault(job, _RefusedJob(reason, self._services.now_s(), world))
        self._refuse_late(identity, refused, job)

    def receive(self, identity: bytes, message: FromRank) -> None:
        if self._live is not None and identity in self._live.ranks:
            self._live.receive(self._live.ranks[identity], message)
        elif isinstance(message, Ping):
            self._services.send(identity, Pong(incarnation=self._services.incarnation, known=True))
        elif isinstance(message, LayoutSent) and self._registration is not None:
            rank = self._registration.rank_of(identity)
            if rank is not None:
                self._judge(self._registration, self._registration.add_layout(rank, message.layout))

    def knows(self, identity: bytes) -> bool:
        registering = self._registration is not None and self._registration.rank_of(identity) is not None
        return registering or (self._live is not None and identity in self._live.ranks)

    def process_gone(self, identity: bytes) -> None:
        if self._live is not None and identity in self._live.ranks:
            rank = self._live.ranks[identity]
            if self._live.started:
                self._live.died(rank)
            else:
                self._abandon(self._live, f"rank {rank} died while attaching")
        elif self._registration is not None:
            rank_or_none = self._registration.rank_of(identity)
            if rank_or_none is not None:
                self.refuse(f"rank {rank_or_none} died while attaching")

    def launcher_gone(self) -> None:
        for run in (self._live, self._kept):
            if run is not None:
                run.launcher_alive = False

    def adopt(self, image: RunImage) -> None:
        """Go on with a run that an earlier saver left in shared memory."""
        if self._live is not None:
            image.remove()
            return
        live = self._install(image, None)
        live.recover()

    def tick(self) -> None:
        """Once a second: whatever depends on time passing."""
        now_s = self._services.now_s()
        registration = self._registration
        if registration is not None:
            refusal = registration.expire(now_s) if self._grant is None else None
            if refusal is not None:
                self.refuse(refusal.reason)
            elif self._live is not None and now_s - registration.since_s > _CONFLICT_S:
                self.refuse(f"{self.directory} is in use by another job whose ranks are alive (pids "
                            f"{self._live.living_pids}): end it, or choose another directory")  # fmt: skip
        if self._kept is not None:
            services = self._services
            lease_s = services.keep_image_s if self._kept.launcher_alive else services.orphan_image_s
            if now_s - self._kept_since_s > lease_s:
                self._drop_kept()
        for job, refused in list(self._refused.items()):
            if now_s - refused.since_s > _REMEMBER_REFUSAL_S:
                del self._refused[job]

    def _displaces(self, identity: bytes, message: Register) -> bool:
        """Whether this is not one more rank of the registration, but somebody in its way."""
        assert self._registration is not None
        if self._registration.job != message.job:
            return True
        return self._registration.identities.get(message.rank, identity) != identity

    # --- registration ----------------------------------------------------------------------------------------------

    def _judge(self, registration: Registration, verdict: Verdict) -> None:
        if isinstance(verdict, Refusal):
            self.refuse(verdict.reason)
        elif isinstance(verdict, Want):
            self._services.send(registration.identities[verdict.rank], LayoutWanted())
        elif isinstance(verdict, Grant):
            self._grant = verdict
            if self._live is None:
                self._services.spawn(self._open(registration, verdict))

    def refuse(self, reason: str) -> None:
        """Every rank that registered is refused now, the others of the same job as they come."""
        registration = self._registration
        if registration is None:
            return
        log.warning("refused %s: %s", self.directory, reason)
        self._registration = self._grant = None
        untold = registration.options.world - len(registration.identities)
        if untold > 0:
            self._refused[registration.job] = _RefusedJob(reason, self._services.now_s(), untold)
        for identity in registration.identities.values():
            self._watch.discard(identity)
            self._services.send(identity, Refused(reason=reason))

    def _refuse_late(self, identity: bytes, refused: _RefusedJob, job: str) -> None:
        self._services.send(identity, Refused(reason=refused.reason))
        refused.untold -= 1
        if refused.untold <= 0:
            self._refused.pop(job, None)

    async def _open(self, registration: Registration, grant: Grant) -> None:
        """What the machine may refuse: the directory, shared memory."""
        options, first = registration.options, registration.members[0]
        peers = [
            Peer(rank, registration.identities[rank], registration.members[rank].process)
            for rank in range(options.world)
        ]
        files = [*(file.path for file in grant.layout.files), *grant.layout.documents]
        record = RunRecord(registration.job, options, files, peers, first.launcher, first.versions)
        try:
            image, undo = await self._services.in_thread(lambda: self._prepare(record, grant))
        except CheckpointError as error:
            if self._registration is registration:
                self.refuse(str(error))
            return
        if self._registration is not registration:  # a rank died or withdrew in the meantime
            image.remove()
            undo()
            return
        self._registration = self._grant = None
        live = self._install(image, grant)
        for rank in range(options.world):
            live.grant(rank)

    def _prepare(self, record: RunRecord, grant: Grant) -> tuple[RunImage, Callable[[], None]]:
        directory = Path(self.directory)
        undo = prepare_directory(directory)
        try:
            sweep(directory)
            return RunImage.create(self._services.endpoint, record, grant.layout), undo
        except BaseException:
            undo()
            raise

    # --- the live run, and what is left of it ----------------------------------------------------------------------

    def _install(self, image: RunImage, grant: Grant | None) -> LiveRun:
        live = LiveRun(
            self._services,
            image,
            grant=grant,
            resume=self._newest,
            on_commit=self._drop_kept,
            on_end=lambda: self._end(live),
        )
        self._live = live
        for peer in image.record.peers:
            self._watch.add(peer.identity, peer.process)
        if image.record.launcher is not None:
            self._watch.add((self.directory, image.path), image.record.launcher)
        return live

    def _newest(self) -> Resume | None:
        newest = max(manifest.committed(Path(self.directory)), default=None)
        if newest is None:
            return None
        step, path = newest
        kept = self._kept.image.newest_image() if self._kept is not None else None
        return Resume(step, str(path), str(kept[1].image) if kept is not None and kept[0] == step else None)

    def _abandon(self, live: LiveRun, reason: str) -> None:
        """A granted run that did not come to start."""
        log.warning("run %s abandoned: %s", live.image.path, reason)
        self._live = None
        live.tell_all(Refused(reason=reason))
        self._discard(live)
        live.image.remove()

    def _end(self, live: LiveRun) -> None:
        self._live = None
        newest = None if live.clean else live.image.newest_image()
        self._discard(live)
        log.info("run %s of %s ended%s", live.image.path, self.directory, ", newest image kept" if newest else "")
        if newest is None:
            live.image.remove()
        else:
            self._drop_kept()
            live.image.keep_only(newest[1])
            self._kept, self._kept_since_s = live, self._services.now_s()
            if live.image.record.launcher is not None:
                self._watch.add((self.directory, live.image.path), live.image.record.launcher)
        if self._registration is not None and self._grant is not None:
            self._services.spawn(self._open(self._registration, self._grant))

    def _drop_kept(self) -> None:
        if self._kept is not None:
            self._discard(self._kept)
            self._kept.image.remove()
            self._kept = None

    def _discard(self, run: LiveRun) -> None:
        for identity in run.ranks:
            self._watch.discard(identity)
        self._watch.discard((self.directory, run.image.path))
