"""What a relay hands over for one of its ranks, one thing after the other. Pure: no I/O, no clock, no sockets.

    Transfer: idle -> said (`Offer`) -> sending (`Wanted`) -> gone (`Held`, or its outcome)
    Report:   idle -> said           -> gone (`Ack`)
    Leave:    idle -> said           -> gone (it is no longer known)

Guarantees: the lead hears of a rank's steps, and then of its end, in the order in which the rank spoke, since for the
lead a report about a step says that the rank will never stage an earlier one. After `reset`, for a new session or a new
lead, everything that is not gone is said again.
"""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

import msgspec

from async_ckpt.core.protocol import Bye, Failed, Skipped, Staged


class Transfer(msgspec.Struct, frozen=True):
    """Hand over the bytes of a staged step."""

    staged: Staged


class Report(msgspec.Struct, frozen=True):
    message: Skipped | Failed | Bye


class Leave(msgspec.Struct, frozen=True):
    """The rank's process is gone."""


Item: TypeAlias = Transfer | Report | Leave


class Outgoing:
    """`count` is the number of pieces that each step of this rank has."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._queue: deque[Item] = deque()
        self._said = False
        self._piece: int | None = None  # of the first item, the next one to send

    @property
    def empty(self) -> bool:
        return not self._queue

    @property
    def steps(self) -> list[int]:
        return [item.staged.step for item in self._queue if isinstance(item, Transfer)]

    def add(self, item: Item) -> None:
        """Added twice it is said once."""
        if isinstance(item, Transfer) and item.staged.step in self.steps:
            return
        if isinstance(item, Report) and any(isinstance(each, Report) and each.message.seq == item.message.seq
                                            for each in self._queue):  # fmt: skip
            return
        if isinstance(item, Leave) and item in self._queue:
            return
        self._queue.append(item)

    def say(self) -> Item | None:
        """The item that is to be said now."""
        if self._said or not self._queue:
            return None
        self._said = True
        return self._queue[0]

    def wanted(self, step: int) -> None:
        if self._said and self._piece is None and self._first_step() == step:
            self._piece = 0

    def next_piece(self) -> tuple[Staged, int] | None:
        """A piece to send now, each once until `reset`."""
        first = self._queue[0] if self._queue else None
        if self._piece is None or self._piece >= self._count or not isinstance(first, Transfer):
            return None
        self._piece += 1
        return first.staged, self._piece - 1

    def over(self, step: int) -> None:
        """The lead holds all of `step`, or its outcome is known."""
        if self._first_step() == step:
            self._pop()
        else:
            kept = [item for item in self._queue if not isinstance(item, Transfer) or item.staged.step != step]
            self._queue = deque(kept)

    def acknowledged(self, seq: int) -> Skipped | Failed | Bye | None:
        """The report that it was, if it is the one that was said."""
        first = self._queue[0] if self._queue else None
        if not isinstance(first, Report) or first.message.seq != seq:
            return None
        self._pop()
        return first.message

    def unknown(self) -> None:
        """The lead does not know this rank, or no longer: nothing of it will be taken."""
        self._queue.clear()
        self.reset()

    def reset(self) -> None:
        self._said, self._piece = False, None

    def _first_step(self) -> int | None:
        first = self._queue[0] if self._queue else None
        return first.staged.step if isinstance(first, Transfer) else None

    def _pop(self) -> None:
        self._queue.popleft()
        self.reset()
