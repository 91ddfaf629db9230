"""The state machine of one run's steps: what ranks report in, what to do out. Pure: no I/O, no clock, no sockets.

A step lives in one slot and goes through

    (first report) -> GATHERING --all ranks staged--> READY -> COMMITTING -> committed | failed
                          |                                                     (slot free)
                          +--a rank skipped, failed, left, or went past it--> skipped | failed

Guarantees, for any order and repetition of reports: a step is committed only if every rank staged it in the same slot;
a step that can no longer be completed is settled at once; steps are committed in ascending order, one at a time;
every step that was reported is settled exactly once, and reported again to whoever asks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from async_ckpt.core.protocol import Settled

_REMEMBERED = 64  # settled steps that a late or repeated report may still ask for; ranks have at most MAX_SLOTS open


class StagedCell(msgspec.Struct, frozen=True, order=True):
    """What a rank's cell in the journal says: it staged `step` in `slot`."""

    step: int
    slot: int
    rank: int


class Commit(msgspec.Struct, frozen=True):
    """Write the image in `slot` to storage as `step`; answer with `commit_done` or `commit_failed`."""

    step: int
    slot: int


class Tell(msgspec.Struct, frozen=True):
    """Send `settled` to `rank`, or to all ranks if it is None."""

    settled: Settled
    rank: int | None = None


Action = Commit | Tell
Report = Literal["staged", "skipped", "failed"]


class _Step:
    def __init__(self, step: int, slot: int) -> None:
        self.step = step
        self.slot = slot
        self.staged: set[int] = set()


class Run:
    """The steps of one run of `world` ranks; `newest_step` is the newest one that it committed."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.committing: _Step | None = None
        self.newest_step: int | None = None
        self._open: dict[int, _Step] = {}  # gathering, ascending once complete: ranks report in order
        self._ready: list[_Step] = []
        self._settled: OrderedDict[int, Settled] = OrderedDict()
        self._gone: dict[int, str] = {}
        self._forgotten_step: int | None = None
        self._told_before: list[int] = []  # slot -> step: what an earlier saver has settled

    @property
    def idle(self) -> bool:
        """Nothing is ready or being committed; what is still gathering can only be completed by ranks."""
        return self.committing is None and not self._ready

    @property
    def finished(self) -> bool:
        return len(self._gone) == self.world and self.idle

    @property
    def open_steps(self) -> list[int]:
        return sorted([*self._open, *(step.step for step in self._ready)])

    def gone(self, rank: int) -> bool:
        return rank in self._gone

    def settled(self, step: int) -> Settled | None:
        return self._settled.get(step)

    def told(self, slot: int) -> int:
        """For the journal: up to which step every step that was put into `slot` has been settled, -1 for none.

        A step that a rank skipped because the slot still holds an earlier one does not count before that one does:
        else the next saver would take the earlier one for settled, and it would be lost.
        """
        held = [entry.step for entry in self._unsettled() if entry.slot == slot]
        settled = [each.step for each in self._settled.values() if each.slot == slot]
        return max((step for step in settled if not held or step < min(held)), default=-1)

    def know(self, settled: Settled) -> None:
        """A step that was settled before this machine was made."""
        self._remember(settled)

    def take_up(self, cells: Iterable[StagedCell], told: Sequence[int]) -> list[Action]:
        """Go on, in a new machine that was told to `know` what is on disk, with what the journal of an earlier saver
        says: all cells that say STAGED, in order, and for each slot what `told` gave."""
        self._told_before = list(told)
        return [action for cell in cells for action in self.report(cell.rank, cell.slot, cell.step, "staged")]

    def report(self, rank: int, slot: int, step: int, report: Report, reason: str = "") -> list[Action]:
        """Rank `rank` says of `step`, which it put into `slot`, that it was staged, skipped or failed."""
        entry = self._open.get(step)
        alone = entry is not None and len(self._open) == 1  # nearly always: nothing else is gathered
        actions = [] if alone else self._pass_over(rank, step)
        if entry is None:
            decided = self._decided(rank, slot, step)
            if decided is not None:
                return actions + decided
            entry = self._open[step] = _Step(step, slot)
            if report == "staged":  # a rank may well skip a step because its slot still holds an open one
                actions += self._drop_slot_sharers(entry)
        if report != "staged":
            return actions + self._settle(entry, report, f"rank {rank}: {reason}")
        if entry.slot != slot:
            reason = f"rank {rank} put it into slot {slot}, another rank into slot {entry.slot}"
            return actions + self._settle(entry, "failed", reason)
        entry.staged.add(rank)
        return actions + self._advance(entry)

    def _decided(self, rank: int, slot: int, step: int) -> list[Action] | None:
        """What there is to say of a step that is no longer, or will never be, gathered; None for a new one."""
        if step in self._settled:
            return [Tell(self._settled[step], rank)]
        if self._is_ready(step):
            return []
        if slot < len(self._told_before) and step <= self._told_before[slot]:
            # It failed, or retention has removed it. Its slot may be half another step's by now.
            reason = "told before the saver was replaced"
            self._settled[step] = Settled(step=step, slot=slot, outcome="failed", reason=reason)
            return [Tell(self._settled[step], rank)]
        if self._forgotten_step is not None and step <= self._forgotten_step:
            stale = Settled(step=step, slot=slot, outcome="skipped", reason="it was settled long ago")
            return [Tell(stale, rank)]
        return None

    def awaits(self, rank: int, step: int) -> bool:
        """Whether it would be news that `rank` has staged `step`: nobody has said so yet, and it is not settled."""
        entry = self._open.get(step)
        if entry is not None:
            return rank not in entry.staged
        return step not in self._settled and not self._is_ready(step)

    def leave(self, rank: int, reason: str) -> list[Action]:
        """Rank `rank` is gone for good. What it had staged counts; what it had not can never be completed."""
        self._gone.setdefault(rank, reason)
        actions: list[Action] = []
        for entry in list(self._open.values()):
            if rank not in entry.staged:
                actions += self._settle(entry, "failed", f"rank {rank} of {self.world} {reason} before it had staged")
        return actions

    def commit_done(self, step: int, settled: Settled) -> list[Action]:
        self._finish_commit(step)
        self.newest_step = step if self.newest_step is None else max(step, self.newest_step)
        return [*self._remember(settled), *self._start_next()]

    def commit_failed(self, step: int, reason: str) -> list[Action]:
        entry = self._finish_commit(step)
        settled = Settled(step=step, slot=entry.slot, outcome="failed", reason=reason)
        return [*self._remember(settled), *self._start_next()]

    def _unsettled(self) -> list[_Step]:
        committing = [self.committing] if self.committing is not None else []
        return [*self._open.values(), *self._ready, *committing]

    def _is_ready(self, step: int) -> bool:
        return any(entry.step == step for entry in self._ready) or (
            self.committing is not None and self.committing.step == step
        )

    def _pass_over(self, rank: int, step: int) -> list[Action]:
        """Ranks report in order, so a report about `step` says that `rank` will never stage an earlier one."""
        actions: list[Action] = []
        for entry in list(self._open.values()):
            if entry.step < step and rank not in entry.staged:
                actions += self._settle(entry, "skipped", f"rank {rank} went on to step {step} without it")
        return actions

    def _drop_slot_sharers(self, entry: _Step) -> list[Action]:
        """A slot holds one step: whoever starts the next one in it has given up on what was gathering there."""
        actions: list[Action] = []
        for other in list(self._open.values()):
            if other.slot == entry.slot and other.step < entry.step:
                actions += self._settle(other, "skipped", f"its slot was taken by step {entry.step}")
        return actions

    def _advance(self, entry: _Step) -> list[Action]:
        missing = [rank for rank in self._gone if rank not in entry.staged] if self._gone else None
        if missing:
            reason = f"rank {missing[0]} of {self.world} {self._gone[missing[0]]}"
            return self._settle(entry, "failed", reason)
        if len(entry.staged) < self.world:
            return []
        del self._open[entry.step]
        self._ready.append(entry)
        return self._start_next()

    def _start_next(self) -> list[Action]:
        if self.committing is not None or not self._ready:
            return []
        self.committing = self._ready.pop(0)
        return [Commit(self.committing.step, self.committing.slot)]

    def _finish_commit(self, step: int) -> _Step:
        entry = self.committing
        if entry is None or entry.step != step:
            raise ValueError(f"step {step} is not being committed")
        self.committing = None
        return entry

    def _settle(self, entry: _Step, outcome: Literal["skipped", "failed"], reason: str) -> list[Action]:
        del self._open[entry.step]
        return self._remember(Settled(step=entry.step, slot=entry.slot, outcome=outcome, reason=reason))

    def _remember(self, settled: Settled) -> list[Action]:
        self._settled[settled.step] = settled
        while len(self._settled) > _REMEMBERED:
            forgotten, _ = self._settled.popitem(last=False)
            self._forgotten_step = max(forgotten, self._forgotten_step or forgotten)
        return [Tell(settled)]
