"""Which committed checkpoints are copied to the second tier, and in which order. Pure: no I/O, no clock.

    add, compared -> QUEUED --begin--> UPLOADING --done--> uploaded
                       |                   +-------gone--> dropped
                       +--trim--> dropped  +-----failed--> failed --add--> QUEUED

Guarantees, for any order of calls: one upload at a time, the newest step first; the newest step that was added is never
dropped; after `trim` at most one step waits that is not wanted for itself, so a slow store never makes a growing
backlog; a step that is queued or being uploaded is `held`, so that nothing removes it before it was copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Literal

import msgspec

_REMEMBERED = 64  # steps that were not uploaded, for whoever asks late

Outcome = Literal["uploaded", "failed", "dropped"]


class Ended(msgspec.Struct, frozen=True):
    """What became of the upload of `step`; a failed one may be queued again, and then ends again."""

    step: int
    outcome: Outcome
    reason: str = ""


class Uploads:
    """The uploads of one training directory to one second tier."""

    def __init__(self) -> None:
        self.uploading: int | None = None
        self._queued: set[int] = set()
        self._there: set[int] = set()
        self._missed: OrderedDict[int, Ended] = OrderedDict()  # failed or dropped

    @property
    def queued(self) -> list[int]:
        """Newest first, as they will be begun."""
        return sorted(self._queued, reverse=True)

    @property
    def held(self) -> frozenset[int]:
        """What must stay in the first tier."""
        return frozenset(self._queued if self.uploading is None else self._queued | {self.uploading})

    @property
    def has_failed(self) -> bool:
        """There are steps that are to be tried again."""
        return any(each.outcome == "failed" for each in self._missed.values())

    @property
    def idle(self) -> bool:
        return not self._queued and self.uploading is None

    def ended(self, step: int) -> Ended | None:
        """None for a step that is held, or that nobody has heard of."""
        if step in self._there:
            return Ended(step, "uploaded")
        return self._missed.get(step)

    def compared(self, there: Collection[int], missing: Collection[int]) -> None:
        """What both tiers hold was looked at: `there` is in the second one, `missing` only in the first, and queued."""
        self._there = set(there)
        for step in missing:
            self._missed.pop(step, None)
        self._queued = (self._queued | {*missing}) - self._there - {self.uploading}

    def add(self, step: int) -> None:
        """`step` was committed to the first tier. What failed before it is queued again: the store may be back."""
        again = {each.step for each in self._missed.values() if each.outcome == "failed"}
        for each in {step, *again} - self._there - {self.uploading}:
            self._missed.pop(each, None)
            self._queued.add(each)

    def trim(self, wanted: Collection[int]) -> list[Ended]:
        """The newest one that is queued goes for all older ones, but for those `wanted` for themselves."""
        dropped = []
        for step in self.queued[1:]:
            if step not in wanted:
                self._queued.remove(step)
                newest = max(self._queued)
                dropped.append(self._miss(step, "dropped", f"step {newest} was committed before its upload began"))
        return dropped

    def begin(self) -> int | None:
        """The step to upload now; None if there is none, or one is under way."""
        if self.uploading is not None or not self._queued:
            return None
        self.uploading = max(self._queued)
        self._queued.remove(self.uploading)
        return self.uploading

    def done(self) -> Ended:
        step = self._finish()
        self._arrive(step)
        return Ended(step, "uploaded")

    def failed(self, reason: str) -> Ended:
        return self._miss(self._finish(), "failed", reason)

    def gone(self, reason: str) -> Ended:
        """It is not in the first tier any more, so it never will be uploaded."""
        return self._miss(self._finish(), "dropped", reason)

    def _finish(self) -> int:
        if self.uploading is None:
            raise ValueError("no upload is under way")
        step, self.uploading = self.uploading, None
        return step

    def _arrive(self, step: int) -> None:
        self._missed.pop(step, None)
        self._there.add(step)

    def _miss(self, step: int, outcome: Outcome, reason: str) -> Ended:
        self._missed.pop(step, None)
        self._missed[step] = ended = Ended(step, outcome, reason)
        while len(self._missed) > _REMEMBERED:
            self._missed.popitem(last=False)
        return ended
