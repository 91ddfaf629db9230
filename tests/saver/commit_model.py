"""The commit protocol with everything that may go wrong in it, small enough to look at every state.

What is real: the state machine (`async_ckpt_saver.run.Run`), with its taking up of an earlier saver's journal. What is
modelled here, each as one atomic move: ranks that copy, skip, fail and die; reports that arrive late, twice, in any
order or, from the dead, never; the journal's cells and what is in the slots; a commit that reads, checks, renames and
tells; a saver that dies between any two of these, and the next one.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from async_ckpt.core.protocol import Settled
from async_ckpt_saver.run import Commit, Report, Run, StagedCell

SLOTS = 2
TORN = -1  # the bytes of a rank's part while it copies
FREE = (0, -1)
WRITING, STAGED = 1, 2
Move = tuple[str, int, int]
_OF_A_RANK = frozenset({"copy", "copied", "skip", "fail", "die", "hear"})  # they leave the saver as it is


@dataclass
class Rank:
    """`reports` are what it has said or will say again, until it dies; `heard` the outcomes that it was told."""

    next_step: int = 0
    copying: int | None = None
    alive: bool = True
    reports: dict[int, Report] = field(default_factory=dict)
    heard: dict[int, str] = field(default_factory=dict)
    occupants: dict[int, int] = field(default_factory=dict)  # slot -> the last step that it put there

    def clone(self) -> Rank:
        return Rank(
            self.next_step, self.copying, self.alive, dict(self.reports), dict(self.heard), dict(self.occupants)
        )

    def key(self) -> Hashable:
        mappings = (frozenset(each.items()) for each in (self.reports, self.heard, self.occupants))
        return self.next_step, self.copying, self.alive, *mappings


@dataclass
class Faults:
    """How many more there may be."""

    deaths: int
    saver_deaths: int
    io_errors: int
    not_staged: int  # steps that a rank skips or fails to copy


class Model:
    def __init__(self, world: int, steps: int, faults: Faults) -> None:
        self.world, self.steps, self.faults = world, steps, faults
        self.ranks = [Rank() for _ in range(world)]
        self.cells = [[FREE] * world for _ in range(SLOTS)]
        self.told = [-1] * SLOTS
        self.content = [[TORN] * world for _ in range(SLOTS)]
        self.disk: dict[int, tuple[int, ...]] = {}
        self.failed_io: set[int] = set()
        self.machine: Run | None = Run(world)
        self.noticed: set[int] = set()
        self.commit: tuple[int, tuple[int, ...]] | None = None  # step, the parts read so far
        self.announced: frozenset[tuple[int, str]] = frozenset()  # what any saver has said of a step
        self._machine_key: Hashable = None

    def after(self, move: Move) -> Model:
        """The state that follows. What a move does not touch is shared: no state is changed once it is known."""
        twin = copy.copy(self)
        twin.faults, twin.ranks, twin.told = copy.copy(self.faults), list(self.ranks), list(self.told)
        twin.cells, twin.content = [list(row) for row in self.cells], [list(row) for row in self.content]
        if move[0] in _OF_A_RANK:
            twin.ranks[move[1]] = self.ranks[move[1]].clone()
        else:
            twin.disk, twin.failed_io, twin.noticed = dict(self.disk), set(self.failed_io), set(self.noticed)
            twin.machine, twin._machine_key = clone(self.machine), None
        twin.play(move)
        twin._note_what_was_said()
        return twin

    def key(self) -> Hashable:
        """Equal for equal states."""
        if self._machine_key is None:
            self._machine_key = fingerprint(self.machine)
        return (
            tuple(rank.key() for rank in self.ranks), tuple(map(tuple, self.cells)), tuple(map(tuple, self.content)),
            tuple(self.told), frozenset(self.disk.items()), frozenset(self.failed_io), frozenset(self.noticed),
            self.commit, self.announced, tuple(vars(self.faults).values()), self._machine_key,
        )  # fmt: skip

    def _note_what_was_said(self) -> None:
        if self.machine is not None:
            said = ((step, self.machine.settled(step)) for step in range(self.steps))
            self.announced |= {(step, settled.outcome) for step, settled in said if settled is not None}

    # --- what may happen -------------------------------------------------------------------------------------------

    def moves(self) -> Iterator[tuple[Move, bool]]:
        """Each move that is possible now, and whether it is a fault."""
        for number, rank in enumerate(self.ranks):
            if rank.alive:
                yield from self._moves_of(number, rank)
            elif self.machine is not None and number not in self.noticed:
                yield ("notice", number, 0), False
        if self.machine is None:
            yield ("start saver", 0, 0), False
            return
        if self.faults.saver_deaths:
            yield ("kill saver", 0, 0), True
        if self.machine.committing is not None:
            yield ("commit", 0, 0), False
            if self.faults.io_errors and (self.commit is None or self.commit[0] not in self.disk):
                yield ("io error", 0, 0), True

    def _moves_of(self, number: int, rank: Rank) -> Iterator[tuple[Move, bool]]:
        if self.faults.deaths:
            yield ("die", number, 0), True
        if rank.copying is not None:
            yield ("copied", number, 0), False
            if self.faults.not_staged:
                yield ("fail", number, 0), True
        elif rank.next_step < self.steps:
            occupant = rank.occupants.get(rank.next_step % SLOTS)
            if occupant is None or occupant in rank.heard:
                yield ("copy", number, 0), False
            if self.faults.not_staged:
                yield ("skip", number, 0), True
        if self.machine is not None:
            for step in rank.reports:
                yield ("deliver", number, step), False
                if step not in rank.heard and self.machine.settled(step) is not None:
                    yield ("hear", number, step), False

    # --- what it does ----------------------------------------------------------------------------------------------

    def play(self, move: Move) -> None:
        kind, number, step = move
        rank = self.ranks[number]
        slot = rank.next_step % SLOTS
        if kind == "copy":
            rank.copying = rank.next_step
            rank.occupants[slot] = rank.next_step
            self.cells[slot][number] = (WRITING, rank.next_step)
            self.content[slot][number] = TORN
        elif kind == "copied":
            self.content[slot][number] = rank.next_step
            self.cells[slot][number] = (STAGED, rank.next_step)
            self._said(rank, "staged")
        elif kind in ("skip", "fail"):
            self.faults.not_staged -= 1
            self._said(rank, "skipped" if kind == "skip" else "failed")
        elif kind == "die":
            self.faults.deaths -= 1
            rank.alive, rank.reports = False, {}
        elif kind == "hear":
            rank.heard[step] = self._machine().settled(step).outcome  # type: ignore[union-attr]
        elif kind == "deliver":
            self._deliver(number, step, rank.reports[step])
        else:
            self._play_saver(kind, number)

    def _said(self, rank: Rank, report: Report) -> None:
        rank.reports[rank.next_step] = report
        rank.copying = None
        rank.next_step += 1

    def _deliver(self, number: int, step: int, report: Report) -> None:
        """As `LiveRun.receive`."""
        for cell in self._staged_cells(number):
            if self.told[cell.slot] < cell.step < step and self._machine().settled(cell.step) is None:
                self._take(self._machine().report(number, cell.slot, cell.step, "staged"))
        self._take(self._machine().report(number, step % SLOTS, step, report))

    def _play_saver(self, kind: str, number: int) -> None:
        if kind == "notice":
            self.noticed.add(number)
            for cell in self._staged_cells(number):
                self._take(self._machine().report(number, cell.slot, cell.step, "staged"))
            self._take(self._machine().leave(number, "died"))
        elif kind == "kill saver":
            self.faults.saver_deaths -= 1
            self.machine, self.commit, self.noticed = None, None, set()
        elif kind == "start saver":
            self.machine = Run(self.world)
            for step in sorted(self.disk):
                self.machine.know(Settled(step=step, slot=0, outcome="committed"))
            cells = [cell for each in range(self.world) for cell in self._staged_cells(each)]
            self._take(self.machine.take_up(sorted(cells), self.told))
        elif kind == "commit":
            self._go_on_committing()
        else:
            self.faults.io_errors -= 1
            step = self._committing()
            self.failed_io.add(step)
            self._fail_commit(step)

    def _go_on_committing(self) -> None:
        """As `recovery.commit_once`: read each rank's part, ask whether the slot is still this step's, rename, tell."""
        step = self._committing()
        parts = self.commit[1] if self.commit is not None else ()
        if step in self.disk:
            self.commit = None
            self._take(self._machine().commit_done(step, Settled(step=step, slot=step % SLOTS, outcome="committed")))
        elif len(parts) < self.world:
            self.commit = (step, (*parts, self.content[step % SLOTS][len(parts)]))
        elif all(cell == (STAGED, step) for cell in self.cells[step % SLOTS]):
            self.disk[step] = parts
        else:
            self._fail_commit(step)

    def _fail_commit(self, step: int) -> None:
        self.commit = None
        self._take(self._machine().commit_failed(step, "failed"))

    def _take(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Commit):
                assert self.commit is None, "two commits at a time"
                self.commit = (action.step, ())
            elif action.rank is None:
                slot = action.settled.slot
                self.told[slot] = max(self.told[slot], self._machine().told(slot))

    def _staged_cells(self, number: int) -> list[StagedCell]:
        cells = [StagedCell(self.cells[slot][number][1], slot, number) for slot in range(SLOTS)
                 if self.cells[slot][number][0] == STAGED]  # fmt: skip
        return sorted(cells)

    def _machine(self) -> Run:
        assert self.machine is not None
        return self.machine

    def _committing(self) -> int:
        committing = self._machine().committing
        assert committing is not None
        return committing.step

    # --- what must hold --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """In every state."""
        for step, parts in self.disk.items():
            assert parts == (step,) * self.world, f"step {step} is torn on disk: {parts}"
        for step in range(self.steps):
            outcomes = {outcome for of, outcome in self.announced if of == step}
            assert "committed" not in outcomes or outcomes == {"committed"}, f"step {step} was said to be {outcomes}"
            assert "committed" not in outcomes or step in self.disk, f"step {step} was acknowledged and is not on disk"
            if step in self.disk:
                assert outcomes <= {"committed"}, f"step {step} is on disk, and was said to be {outcomes}"
            if self.staged_by_all(step) and outcomes - {"committed"}:
                assert step in self.failed_io, f"every rank had staged step {step}, and yet it was {outcomes}"

    def staged_by_all(self, step: int) -> bool:
        """handle.staged() has returned on every rank, and nothing was put into the slot since."""
        return all(cell == (STAGED, step) for cell in self.cells[step % SLOTS])

    def check_end(self) -> None:
        """Nothing more can happen, but for repetition: all is settled, and the newest image in RAM is the newest
        checkpoint, which is what a restarted job resumes from."""
        machine = self._machine()
        assert machine.idle
        assert not machine.open_steps, "a step that is never settled"
        for rank in self.ranks:
            if rank.alive:
                assert rank.next_step == self.steps, "a rank that cannot go on"
                assert set(rank.heard) == set(range(self.steps)), "a rank that was never told"
        whole = [step for step in range(self.steps) if self.staged_by_all(step) and step not in self.failed_io]
        assert not whole or max(whole) == max(self.disk), "the image that would be kept is not the newest checkpoint"
        if not any(rank.alive for rank in self.ranks):
            assert machine.finished

    def ended(self) -> bool:
        return (
            self.machine is not None
            and self.machine.idle
            and all(rank.alive or number in self.noticed for number, rank in enumerate(self.ranks))
            and all(set(rank.heard) == set(range(self.steps)) for rank in self.ranks if rank.alive)
        )


def clone(value: Any) -> Any:
    """A deep copy, ten times as fast as `copy.deepcopy`: what cannot change is shared."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        return kind((key, clone(each)) for key, each in value.items())
    if kind is list:
        return [clone(each) for each in value]
    if kind is set:
        return set(value)
    if hasattr(value, "__dict__"):
        twin = copy.copy(value)
        twin.__dict__.update({name: clone(each) for name, each in value.__dict__.items()})
        return twin
    return value


def fingerprint(value: Any) -> Hashable:
    """Equal for equal machines: all that is in them, but for the words of a reason."""
    if isinstance(value, Settled):
        return value.step, value.outcome
    if isinstance(value, dict):
        return frozenset((key, fingerprint(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(fingerprint(each) for each in value)
    if isinstance(value, set):
        return frozenset(value)
    if hasattr(value, "__dict__"):
        return tuple(fingerprint(each) for each in value.__dict__.values())
    return None if isinstance(value, str) and value not in ("committed", "skipped", "failed", "staged") else value
