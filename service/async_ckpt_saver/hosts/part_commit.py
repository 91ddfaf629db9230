"""A lead's commits of what every host writes itself: the files are made here, each relay is asked to write its part,
and the checkpoint gets its name when all of them have said that theirs is durable.

A relay that is not connected is asked when it is. One that is lost, by the lease of its ranks, ends the attempt.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from functools import cached_property, partial
from typing import TYPE_CHECKING

from async_ckpt.core.errors import CheckpointError

from ..datafile import StepHook, Written, in_pieces
from ..partfile import PartFile, make_file, mapped_source, write_pieces
from .link_words import PartFailed, PartWritten, WritePart
from .part_answers import Answers, Failure
from .parts import Plan
from .shares import host_of, read_layout, read_share
from .spans import Span

if TYPE_CHECKING:
    from ..image import RunImage
    from ..live import LiveRun
    from ..run import Commit
    from ..services import Services
    from .copy_keeper import Way

log = logging.getLogger(__name__)


class PartError(CheckpointError):
    """A host has not written its part; `errno` as it said."""

    def __init__(self, reason: str, code: int = 0) -> None:
        super().__init__(reason)
        self.errno = code or None


def plan_of(image: RunImage) -> Plan:
    """Blocks. Raises CheckpointError."""
    sizes_bytes = [file.total_bytes for file in read_layout(image.path).files]
    hosts = hosts_of(image)
    shares = {rank: read_share(image.path, rank, sizes_bytes) for rank in hosts}
    return Plan.of(sizes_bytes, shares, hosts)


def hosts_of(image: RunImage) -> dict[int, str]:
    """Where each rank is that is not on this host."""
    found = {peer.rank: host_of(peer.process) for peer in image.record.peers}
    return {rank: host for rank, host in found.items() if host is not None}


class PartCommit:
    """`writer.Parts` of one attempt. `write` runs in a thread, all else in the loop. `left`: the saver ends, and the
    next one is to try again."""

    def __init__(self, services: Services, run: LiveRun, order: Commit) -> None:
        self.left = False
        self._services, self._run, self._order = services, run, order
        self._answers = Answers({})
        self.hosts = hosts_of(run.image)
        self._first = {host: rank for rank, host in sorted(self.hosts.items(), reverse=True)}  # its lowest rank
        self._name = ""
        self._ways: dict[str, Way] = {}  # in which session each host was asked
        self._done: Future[Answers] = Future()

    # --- in a thread -------------------------------------------------------------------------------------------------

    @cached_property
    def _plan(self) -> Plan:
        """Blocks. Raises CheckpointError."""
        return plan_of(self._run.image)

    @property
    def paths(self) -> Sequence[str]:
        return [self._run.image.record.files[number] for number in self._plan.files]

    def write(self, image: str, temporary: str, hashing: Executor, step_hook: StepHook) -> dict[str, Written]:
        plan, files = self._plan, self._run.image.record.files
        for number in plan.files:
            step_hook(f"make:{files[number]}")
            make_file(os.path.join(temporary, files[number]), plan.sizes_bytes[number])
        self._call(self._begin, os.path.basename(temporary))
        try:
            mine: dict[int, list[Span]] = defaultdict(list)
            for piece in plan.own:
                mine[piece.file].append(piece)
            own: list[int] = []
            direct: dict[int, bool] = {}
            for number in plan.files:
                with PartFile(temporary, files[number], plan.sizes_bytes[number]) as file:
                    step_hook(f"write:{files[number]}")
                    with mapped_source(image, files[number]) as source:
                        pieces = [(piece.start, piece.stop) for piece in mine[number]]
                        before = partial(self._before_piece, step_hook, files[number])
                        own += write_pieces(source, file, pieces, hashing, before)
                    step_hook(f"fsync:{files[number]}")
                    file.sync()
                    direct[number] = file.direct
            step_hook("parts")
            answers = self._done.result()
        finally:
            self._call(self._end)
        lines = plan.lines(own, answers.hashes)
        return {files[n]: in_pieces(plan.sizes_bytes[n], each, direct[n]) for n, each in lines.items()}

    def _before_piece(self, step_hook: StepHook, path: str) -> None:
        if self._done.done():
            self._done.result()  # raises: a host has failed already
        step_hook(f"chunk:{path}")

    def _call(self, what: object, *arguments: object) -> None:
        self._services.loop.call_soon_threadsafe(what, *arguments)  # type: ignore[arg-type]

    # --- in the loop -------------------------------------------------------------------------------------------------

    def _begin(self, name: str) -> None:
        self._name = name
        self._answers = Answers({host: len(pieces) for host, pieces in self._plan.others.items()})
        for rank, host in self.hosts.items():
            if self._run.gone(rank):
                self.lost(host)
        for host in self._answers.waiting:
            identity = self._identity(host)
            way = self._services.way_of(identity)
            if way is not None:
                self.ask(host, way)
        self._look()

    def ask(self, host: str, way: Way) -> None:
        """In a new session: what was asked in the last one may be lost."""
        if not self._name or host not in self._answers.waiting or self._ways.get(host) == way:
            return
        self._ways[host] = way
        order = self._order
        way.say(WritePart(identity=self._identity(host), slot=order.slot, step=order.step, name=self._name))

    def answered(self, host: str, way: Way, word: PartWritten | PartFailed) -> None:
        """What is heard in another session than the host was asked in counts no more: its saver may have been replaced
        by one that is writing now."""
        if word.name != self._name or self._ways.get(host) != way:
            return
        if isinstance(word, PartWritten):
            hashes = array("Q")
            hashes.frombytes(word.hashes[: len(word.hashes) // 8 * 8])
            self._answers.written(host, hashes)
        else:
            self._answers.failed(Failure(host, word.reason, word.code))
        self._look()

    def lost(self, host: str) -> None:
        lease_s = self._services.lease_s
        self._answers.failed(Failure(host, f"it was lost before it had written its part: silent for {lease_s:g} s"))
        self._look()

    def leave(self) -> None:
        """To the next saver: all that it needs is in shared memory, here and there."""
        if not self._done.done():
            self.left = True
            self._done.set_exception(PartError("this saver ends before every host has written its part"))

    def _look(self) -> None:
        if self._done.done():
            return
        failure = self._answers.failure
        if failure is not None:
            self._done.set_exception(PartError(f"{self._called(failure.host)}: {failure.reason}", failure.code))
        elif self._answers.complete:
            self._done.set_result(self._answers)

    def _end(self) -> None:
        self._name = ""

    def _identity(self, host: str) -> bytes:
        return self._run.image.record.peers[self._first[host]].identity

    def _called(self, host: str) -> str:
        """For people."""
        way = self._ways.get(host)
        return way.name if way is not None else f"the host of rank {self._first[host]}"


class PartCommits:
    """Of one saver: at most one a run."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._open: dict[LiveRun, PartCommit] = {}
        self._leaving = False

    def begin(self, run: LiveRun, order: Commit) -> PartCommit | None:
        """None for a run of which the lead has all bytes."""
        if not run.image.record.hosts_write:
            return None
        self._open[run] = PartCommit(self._services, run, order)
        if self._leaving:
            self._open[run].leave()
        return self._open[run]

    def end(self, run: LiveRun) -> None:
        self._open.pop(run, None)

    def answered(self, run: LiveRun, rank: int, way: Way, word: PartWritten | PartFailed) -> None:
        host = self._open[run].hosts.get(rank) if run in self._open else None
        if host is not None:
            self._open[run].answered(host, way, word)

    def bound(self, run: LiveRun, host: str, way: Way) -> None:
        if run in self._open:
            self._open[run].ask(host, way)

    def lost(self, run: LiveRun, rank: int) -> None:
        """Nothing more will be heard of `rank`. A relay says that a rank has gone only after the outcome of all that it
        had staged, so it is the host that is lost."""
        host = self._open[run].hosts.get(rank) if run in self._open else None
        if host is not None:
            self._open[run].lost(host)

    def leave_soon(self) -> None:
        """The saver ends: nobody looks after leases any more."""
        self._services.loop.call_later(self._services.lease_s, self._leave)

    def _leave(self) -> None:
        self._leaving = True
        for each in self._open.values():
            each.leave()
