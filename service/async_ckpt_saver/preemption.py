"""How the ranks of a run agree on one step to stop after. Pure: no I/O, no clock, no sockets.

A rank promises: "I have begun c optimizer steps, and will begin one more at most until I hear". The first promise makes
the saver ask all others for theirs; when every rank has promised, all stop after max(c) + 1 steps. Nobody can have
begun more by then, and nobody can have been told yet that it goes on.

Guarantees, for any order, repetition and loss of messages, and if the saver dies and is replaced at any moment: no two
ranks ever hear different steps, unless one of them has lost patience and withdrawn its promise. All that a saver knows
of an agreement comes from its ranks, again if need be.
"""

from __future__ import annotations

import msgspec


class Ask(msgspec.Struct, frozen=True):
    """`rank` has not promised yet."""

    rank: int


class Tell(msgspec.Struct, frozen=True):
    """Send the agreed number of steps to `rank`, or to all ranks if it is None. `steps` None: no agreement."""

    steps: int | None
    rank: int | None = None


Action = Ask | Tell


class Agreement:
    """The agreement of one run of `world` ranks. One that a rank has left cannot agree any more: there will be no step
    that every rank stages. What was agreed before stands."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.steps: int | None = None
        self._void = False
        self._promised: dict[int, int] = {}
        self._gone: set[int] = set()

    def hear(self, rank: int, promised: int | None, stop: int | None) -> list[Action]:
        """`rank` says what it has promised, and what it has heard of an agreement, here or from an earlier saver."""
        if rank in self._gone:
            return []
        if stop is not None:
            if self.steps is not None or any(begun >= stop for begun in self._promised.values()):
                return []
            self.steps = stop
            return [Tell(stop)]
        if promised is None:
            self._promised.pop(rank, None)
            return []
        if self.steps is not None and promised >= self.steps:
            # Nobody answered for so long that this rank has gone past. Ranks train in lock step: so have the others.
            self.steps = None
            self._promised.clear()
        if self.steps is not None or self._void:
            return [Tell(self.steps, rank)]
        # Asked at the start, and whenever somebody still waits: a question or its answer may have been lost.
        asking = not self._promised or rank in self._promised
        self._promised[rank] = promised
        return self._judge(asking=asking)

    def leave(self, rank: int) -> list[Action]:
        """`rank` is gone for good."""
        self._gone.add(rank)
        self._promised.pop(rank, None)
        if not self._promised or self.steps is not None or self._void:
            return []
        return self._judge(asking=False)

    def _judge(self, *, asking: bool) -> list[Action]:
        missing = [rank for rank in range(self.world) if rank not in self._promised and rank not in self._gone]
        if missing:  # also where a rank has left: one that lives may have heard of an agreement made before
            return [Ask(rank) for rank in missing] if asking else []
        if self._gone:
            self._void = True
        else:
            self.steps = max(self._promised.values()) + 1
        return [Tell(self.steps)]
