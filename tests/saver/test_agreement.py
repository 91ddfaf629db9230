"""Every interleaving of signals, optimizer steps, messages, deaths and restarts: all ranks stop after one step or none.

Both halves of the agreement are the real ones: `Agreement` in the saver, `Stand` on the rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from async_ckpt.preemption import Stand
from async_ckpt_saver.preemption import Action, Agreement, Ask

ASK = "ask"
Move = tuple[str, int]


class World:
    """Some ranks in training, and a saver. Messages are in order; a saver that dies takes with it what was on its way.

    `lock_step`: a collective in every step, as in all that this package saves. `limits`: how many savers and ranks may
    still die, ranks lose patience, signals come, and messages be said again before anything is known to be lost.
    """

    def __init__(self, world: int, steps: int, lock_step: bool, limits: dict[str, int]) -> None:
        self.world, self.steps, self.lock_step, self.limits = world, steps, lock_step, limits
        self.saver = Agreement(world)
        self.stands = [Stand() for _ in range(world)]
        self.to_saver: list[tuple[tuple[int | None, int | None], ...]] = [()] * world
        self.to_rank: list[tuple[str | int | None, ...]] = [()] * world
        self.signalled: frozenset[int] = frozenset()
        self.held_off: frozenset[int] = frozenset()
        self.gave_up: frozenset[int] = frozenset()
        self.dead: frozenset[int] = frozenset()
        self.closed: frozenset[int] = frozenset()
        self.unnoticed: frozenset[int] = frozenset()  # gone, and this saver does not know it yet
        self.met: frozenset[int] = frozenset(range(world))  # have told this saver where they stand, if they had to
        self.heard: frozenset[int] = frozenset()

    def copy(self) -> World:
        other = World.__new__(World)
        other.__dict__.update(self.__dict__)
        other.limits = dict(self.limits)
        other.to_saver, other.to_rank = list(self.to_saver), list(self.to_rank)
        other.stands = []
        for stand in self.stands:
            twin = Stand()
            twin.__dict__.update(stand.__dict__)
            other.stands.append(twin)
        other.saver = Agreement(self.world)
        other.saver.__dict__.update(self.saver.__dict__)
        other.saver._promised, other.saver._gone = dict(self.saver._promised), set(self.saver._gone)
        return other

    @property
    def key(self) -> object:
        saver = self.saver
        return (
            tuple((stand.begun, stand.promised, stand.stop) for stand in self.stands),
            (saver.steps, saver._void, tuple(sorted(saver._promised.items())), frozenset(saver._gone)),
            (tuple(self.to_saver), tuple(self.to_rank), tuple(self.limits.values())),
            (self.signalled, self.held_off, self.gave_up, self.dead, self.closed, self.unnoticed, self.met, self.heard),
        )

    @property
    def leaving(self) -> frozenset[int]:
        return self.dead | self.closed

    def talks(self, rank: int) -> bool:
        return rank not in self.leaving

    def moves(self) -> Iterator[Move]:
        for rank in range(self.world):
            yield from ((kind, rank) for kind in self._of_rank(rank))
            yield from ((kind, rank) for kind in self._of_messages(rank))
        if self.limits["saver"] > 0:
            yield "saver dies", 0
            yield "saver dies, its words arrive", 0

    def _of_rank(self, rank: int) -> Iterator[str]:
        stand = self.stands[rank]
        if not self.talks(rank):
            return
        if not stand.preempted and not stand.at_limit and stand.begun < self.steps:
            slowest = min(each.begun for each in self.stands)
            if not self.lock_step or (stand.begun <= slowest and not self.leaving):
                yield "begin"
        if self.limits["signals"] > 0 and rank not in self.signalled:
            yield "signal"
        if not stand.at_limit and (self._committed(rank) if stand.preempted else stand.begun == self.steps):
            yield "close"
        if self.limits["rank"] > 0:
            yield "die"
        if self.limits["patience"] > 0 and stand.at_limit:
            yield "give up"

    def _committed(self, rank: int) -> bool:
        """A rank that has stopped closes when its step is committed: every other rank has to stop there as well."""
        return all(stand.preempted for stand in self.stands)

    def _of_messages(self, rank: int) -> Iterator[str]:
        if self.to_saver[rank]:
            yield "to saver"
        if rank in self.unnoticed and (rank in self.dead or not self.to_saver[rank]):
            yield "notice"
        if self.to_rank[rank]:
            yield "to rank"
        # After a second: hardly anything said before is still on its way.
        if self.limits["repeats"] > 0 and self.talks(rank) and sum(map(len, (*self.to_saver, *self.to_rank))) < 2:
            stand = self.stands[rank]
            wants = rank in self.signalled and rank not in self.held_off and stand.stop is None
            if wants or stand.promised is not None or (stand.stop is not None and rank not in self.met):
                yield "repeat"

    def play(self, move: Move) -> None:
        kind, rank = move
        stand = self.stands[rank]
        if kind == "begin":
            stand.begin()
        elif kind == "signal":
            self.limits["signals"] -= 1
            self.signalled |= {rank}
            stand.promise()
            self._say(rank)
        elif kind == "repeat":
            self.limits["repeats"] -= 1
            self.met |= {rank}
            stand.promise()
            self._say(rank)
        elif kind == "give up":
            self.limits["patience"] -= 1
            stand.withdraw()
            self.held_off |= {rank}
            self.gave_up |= {rank}
            self._say(rank)
        elif kind == "die":
            self.limits["rank"] -= 1
            self.dead |= {rank}
            self.unnoticed |= {rank}
            self.to_rank[rank] = ()
        elif kind == "close":
            self.closed |= {rank}
            self.unnoticed |= {rank}
            self.to_rank[rank] = ()
        elif kind == "notice":
            self.unnoticed -= {rank}
            self.to_saver[rank] = ()
            self._perform(self.saver.leave(rank))
        elif kind == "to saver":
            (promised, stop), *rest = self.to_saver[rank]
            self.to_saver[rank] = tuple(rest)
            self._perform(self.saver.hear(rank, promised, stop))
        elif kind == "to rank":
            word, *others = self.to_rank[rank]
            self.to_rank[rank] = tuple(others)
            self._hear(rank, word)
        else:
            self._replace_saver(arrive="arrive" in kind)

    def _say(self, rank: int) -> None:
        stand = self.stands[rank]
        self.to_saver[rank] = (*self.to_saver[rank], (stand.promised, stand.stop))

    def _hear(self, rank: int, word: str | int | None) -> None:
        stand = self.stands[rank]
        if word == ASK:
            stand.promise()
            self._say(rank)
            return
        assert not isinstance(word, str)
        new, begun, at_limit = stand.stop is None, stand.begun, stand.at_limit
        if not stand.hear(word):
            assert rank in self.gave_up, f"rank {rank} went past step {word} before it heard of it"
            stand.promise()
            self._say(rank)
            return
        if word is None:
            self.held_off |= {rank}
        elif new:
            assert begun + (not at_limit) <= word
            self.heard |= {word}
            assert len(self.heard) == 1 or self.gave_up, f"ranks heard different steps: {self.heard}"

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            word = ASK if isinstance(action, Ask) else action.steps
            for rank in range(self.world) if action.rank is None else (action.rank,):
                if self.talks(rank):
                    self.to_rank[rank] = (*self.to_rank[rank], word)

    def _replace_saver(self, *, arrive: bool) -> None:
        self.limits["saver"] -= 1
        self.saver = Agreement(self.world)
        self.to_saver = [()] * self.world
        if not arrive:
            self.to_rank = [()] * self.world
        self.held_off = self.met = frozenset()
        self.unnoticed = self.leaving

    @property
    def parted(self) -> bool:
        stops = [stand.stop for stand in self.stands if stand.stop is not None]
        promised = [stand.promised for stand in self.stands if stand.promised is not None]
        return bool(self.gave_up and stops and promised and min(stops) <= max(promised))

    def check_agreement_ends(self) -> None:
        """With nothing more going wrong, messages alone end it, while every training thread stands still.

        But for one that lost patience and went past the step that another rank had heard: it loses patience again.
        """
        calm = self.copy()
        calm.limits["repeats"] = 200
        for turn in range(200):
            moves = [(kind, rank) for rank in range(calm.world) for kind in calm._of_messages(rank)]
            if not moves:
                break
            # What is on its way arrives before somebody has waited for a second.
            moves = [move for move in moves if move[0] != "repeat"] or moves
            calm.play(moves[turn % len(moves)])
        else:
            assert calm.parted, "the ranks talk for ever"
            return
        for rank, stand in enumerate(calm.stands):
            assert calm.leaving >= {rank} or stand.promised is None, f"rank {rank} waits for ever"
        if not calm.leaving and not calm.gave_up and calm.heard:
            assert all(stand.stop is not None for stand in calm.stands), "only some ranks heard"
        if not calm.leaving and not calm.gave_up and calm.signalled:
            assert all(stand.stop is not None for stand in calm.stands), "a signal, and nobody stops"


def explore(world: int, steps: int, *, lock_step: bool = True, **limits: int) -> tuple[int, int]:
    """(states, states in which an agreement was reached)."""
    allowed = {"saver": 0, "rank": 0, "patience": 0, "signals": world, "repeats": 0} | limits
    start = World(world, steps, lock_step, allowed)
    seen = {start.key}
    stack = [start]
    agreed = 0
    while stack:
        model = stack.pop()
        model.check_agreement_ends()
        agreed += bool(model.heard)
        for move in model.moves():
            after = model.copy()
            after.play(move)
            key = after.key
            if key not in seen:
                seen.add(key)
                stack.append(after)
    return len(seen), agreed


CASES = {
    "1 rank, 2 restarts": (1, 4, {"saver": 2, "repeats": 9}),
    "2 ranks": (2, 3, {"repeats": 1}),
    "2 ranks, restart": (2, 2, {"saver": 1, "signals": 1, "repeats": 1}),
    "2 ranks, restart, death": (2, 1, {"saver": 1, "rank": 1, "signals": 1, "repeats": 1}),
    "2 ranks, restart, impatience": (2, 1, {"saver": 1, "patience": 1, "signals": 1, "repeats": 1}),
    "2 ranks, impatience": (2, 3, {"patience": 2, "signals": 1}),
    "2 ranks, free": (2, 3, {"lock_step": False, "repeats": 1}),
    "3 ranks, 1 signal": (3, 1, {"signals": 1}),
}
THOROUGH = {
    "2 ranks, 2 signals, restart": (2, 2, {"saver": 1, "repeats": 2}),
    "2 ranks, 2 signals, restart, death": (2, 1, {"saver": 1, "rank": 1, "repeats": 1}),
    "2 ranks, everything": (2, 1, {"saver": 1, "rank": 1, "patience": 1, "signals": 1, "repeats": 1}),
    "2 ranks, 2 restarts": (2, 1, {"saver": 2, "signals": 1, "repeats": 1}),
    "3 ranks, 3 signals": (3, 1, {}),
    "3 ranks, 2 steps": (3, 2, {"signals": 1}),
    "3 ranks, restart": (3, 1, {"signals": 1, "saver": 1}),
    "3 ranks, death": (3, 1, {"signals": 1, "rank": 1}),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in THOROUGH)])
def test_every_interleaving_stops_all_ranks_after_one_step(case: str) -> None:
    world, steps, limits = (CASES | THOROUGH)[case]
    states, agreed = explore(world, steps, **limits)  # type: ignore[arg-type]
    print(f"{case}: {states} states, {agreed} with an agreement")
    assert states > 100
    assert agreed > 30
