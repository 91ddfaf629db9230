"""The state machine of a run, explored over every interleaving of what its ranks may do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.core.protocol import Settled
from async_ckpt_saver.run import Commit, Run, Tell

SLOTS = 2


def test_a_step_is_committed_when_the_last_rank_has_staged_it() -> None:
    run = Run(3)
    assert run.report(0, 0, 10, "staged") == []
    assert run.report(2, 0, 10, "staged") == []
    assert run.report(1, 0, 10, "staged") == [Commit(10, 0)]


def test_a_skip_settles_the_step_for_all() -> None:
    run = Run(2)
    run.report(0, 0, 10, "staged")
    (tell,) = run.report(1, 0, 10, "skipped", "busy")
    assert isinstance(tell, Tell)
    assert (tell.rank, tell.settled.outcome, tell.settled.slot) == (None, "skipped", 0)
    assert "rank 1" in tell.settled.reason


def test_a_late_report_of_a_settled_step_is_answered_to_that_rank_alone() -> None:
    run = Run(2)
    run.report(0, 0, 10, "skipped", "busy")
    (tell,) = run.report(1, 0, 10, "staged")
    assert isinstance(tell, Tell)
    assert (tell.rank, tell.settled.step, tell.settled.outcome) == (1, 10, "skipped")


def test_a_rank_that_goes_on_drops_the_step_that_it_left_out() -> None:
    run = Run(2)
    run.report(0, 0, 10, "staged")
    tell, *rest = run.report(1, 1, 20, "staged")
    assert rest == []
    assert isinstance(tell, Tell)
    assert (tell.settled.step, tell.settled.outcome) == (10, "skipped")
    assert run.report(0, 1, 20, "staged") == [Commit(20, 1)]


def test_ranks_that_disagree_on_the_slot_fail_the_step() -> None:
    run = Run(2)
    run.report(0, 0, 10, "staged")
    (tell,) = run.report(1, 1, 10, "staged")
    assert isinstance(tell, Tell)
    assert tell.settled.outcome == "failed"


def test_a_dead_rank_fails_what_it_had_not_staged_and_everything_later() -> None:
    run = Run(2)
    run.report(0, 0, 10, "staged")
    (tell,) = run.leave(1, "died")
    assert isinstance(tell, Tell)
    assert (tell.settled.step, tell.settled.outcome) == (10, "failed")
    assert "rank 1" in tell.settled.reason
    (tell,) = run.report(0, 1, 20, "staged")
    assert isinstance(tell, Tell)
    assert tell.settled.outcome == "failed"


def test_what_everybody_had_staged_is_committed_though_everybody_is_dead() -> None:
    run = Run(2)
    run.report(0, 0, 10, "staged")
    run.report(1, 0, 10, "staged")
    run.leave(0, "died")
    run.leave(1, "died")
    assert not run.finished
    run.commit_done(10, Settled(step=10, slot=0, outcome="committed"))
    assert run.finished
    assert run.newest_step == 10


def test_commits_are_one_at_a_time_and_in_order() -> None:
    run = Run(1)
    assert run.report(0, 0, 10, "staged") == [Commit(10, 0)]
    assert run.report(0, 1, 20, "staged") == []
    tell, commit = run.commit_failed(10, "disk full")
    assert isinstance(tell, Tell)
    assert (tell.settled.outcome, tell.settled.reason) == ("failed", "disk full")
    assert commit == Commit(20, 1)
    with pytest.raises(ValueError, match="10"):
        run.commit_done(10, Settled(step=10, slot=0, outcome="committed"))


def test_a_step_settled_long_ago_is_still_answered() -> None:
    run = Run(1)
    for step in range(100):
        run.report(0, step % SLOTS, step, "skipped", "busy")
    assert run.settled(0) is None
    (tell,) = run.report(0, 0, 0, "staged")
    assert isinstance(tell, Tell)
    assert tell.settled.outcome == "skipped"


class World:
    """Ranks that behave as clients do, a saver, and a disk: the moves that are possible, and what must hold."""

    def __init__(self, world: int, steps: int) -> None:
        self.run = Run(world)
        self.world = world
        self.steps = steps
        self.next_step = [0] * world
        self.staged: dict[int, set[int]] = {}
        self.dead: set[int] = set()
        self.committing: int | None = None
        self.outcomes: dict[int, str] = {}
        self.reported: set[int] = set()
        self.committed: list[int] = []

    def moves(self) -> Iterator[tuple[str, int]]:
        for rank in range(self.world):
            if rank in self.dead:
                continue
            yield "die", rank
            step = self.next_step[rank]
            # A slot is free for this rank when the step that was in it is settled.
            if step < self.steps:
                if step - SLOTS < 0 or step - SLOTS in self.outcomes:
                    yield "stage", rank
                yield "skip", rank
                yield "fail", rank
        if self.committing is not None:
            yield "commit", 0
            yield "io error", 0

    def play(self, move: tuple[str, int]) -> None:
        kind, rank = move
        if kind == "die":
            self.dead.add(rank)
            self._take(self.run.leave(rank, "died"))
        elif kind == "commit":
            step = self._committing()
            self.committed.append(step)
            self._take(self.run.commit_done(step, Settled(step=step, slot=step % SLOTS, outcome="committed")))
        elif kind == "io error":
            self._take(self.run.commit_failed(self._committing(), "EIO"))
        else:
            step = self.next_step[rank]
            self.next_step[rank] += 1
            self.reported.add(step)
            if kind == "stage":
                self.staged.setdefault(step, set()).add(rank)
            report = {"stage": "staged", "skip": "skipped", "fail": "failed"}[kind]
            actions = self.run.report(rank, step % SLOTS, step, report)  # type: ignore[arg-type]
            self._take(actions)
            again = self.run.report(rank, step % SLOTS, step, report)  # type: ignore[arg-type]
            assert all(isinstance(action, Tell) and action.rank == rank for action in again), "not idempotent"

    def _committing(self) -> int:
        step, self.committing = self.committing, None
        assert step is not None
        return step

    def _take(self, actions: list[Commit | Tell]) -> None:
        for action in actions:
            if isinstance(action, Commit):
                assert self.committing is None, "two commits at a time"
                assert self.staged.get(action.step) == set(range(self.world)), "a step that not every rank staged"
                assert not self.committed or action.step > self.committed[-1], "out of order"
                self.committing = action.step
            elif action.rank is None:
                assert action.settled.step not in self.outcomes, "settled twice"
                self.outcomes[action.settled.step] = action.settled.outcome

    def check_end(self) -> None:
        """Nobody can move any more: every step that was reported has an end, and what all had staged was tried."""
        if len(self.dead) == self.world:
            assert self.run.finished
            assert self.reported == set(self.outcomes)
        whole = {step for step, ranks in self.staged.items() if len(ranks) == self.world}
        for step in whole:
            assert self.outcomes[step] in ("committed", "failed", "skipped")
        lost = {step for step in whole if self.outcomes[step] == "skipped"}
        assert not lost, "every rank staged it, and yet it was dropped"


def explore(world: int, steps: int) -> tuple[int, int]:
    """Every sequence of moves, by replay; states that look the same are entered once. Returns (states, ends)."""
    seen: set[object] = set()
    ends = 0
    stack: list[tuple[tuple[str, int], ...]] = [()]
    while stack:
        history = stack.pop()
        model = World(world, steps)
        for move in history:
            model.play(move)
        key = _fingerprint(model)
        if key in seen:
            continue
        seen.add(key)
        moves = list(model.moves())
        if not moves:
            model.check_end()
            ends += 1
        stack.extend((*history, move) for move in moves)
    return len(seen), ends


def _fingerprint(model: World) -> object:
    return (
        tuple(model.next_step),
        frozenset(model.dead),
        model.committing,
        tuple(sorted(model.outcomes.items())),
        tuple(sorted((step, frozenset(ranks)) for step, ranks in model.staged.items())),
        tuple(model.committed),
        tuple(model.run.open_steps),
    )


@pytest.mark.parametrize(("world", "steps"), [(1, 4), (2, 3), (3, 2)])
def test_every_interleaving_keeps_the_promises(world: int, steps: int) -> None:
    states, ends = explore(world, steps)
    assert states > 50
    assert ends > 10


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_reports_in_any_order_never_break_it(data: st.DataObject) -> None:
    """Also what no client of ours would say: the machine raises nothing and commits nothing that was not staged."""
    world = data.draw(st.integers(1, 3))
    run = Run(world)
    staged: dict[tuple[int, int], set[int]] = {}
    committing: Commit | None = None
    for _ in range(data.draw(st.integers(1, 40))):
        actions: list[Commit | Tell] = []
        kind = data.draw(st.sampled_from(["staged", "skipped", "failed", "leave", "done"]))
        if kind == "done":
            if committing is not None:
                step, committing = committing, None
                actions = run.commit_done(step.step, Settled(step=step.step, slot=step.slot, outcome="committed"))
        elif kind == "leave":
            actions = run.leave(data.draw(st.integers(0, world - 1)), "died")
        else:
            rank, slot, step_number = (data.draw(st.integers(0, limit)) for limit in (world - 1, SLOTS - 1, 5))
            if kind == "staged":
                staged.setdefault((step_number, slot), set()).add(rank)
            actions = run.report(rank, slot, step_number, kind)  # type: ignore[arg-type]
        for action in actions:
            if isinstance(action, Commit):
                assert committing is None
                assert staged[action.step, action.slot] == set(range(world))
                committing = action


def test_the_exploration_sees_a_broken_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit on the first report: the model must notice."""
    original = Run._advance

    def hasty(self: Run, entry: object) -> object:
        entry.staged.update(range(self.world))  # type: ignore[attr-defined]
        return original(self, entry)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "_advance", hasty)
    with pytest.raises(AssertionError, match="not every rank staged"):
        explore(2, 2)


def test_permutations_of_three_ranks_end_alike() -> None:
    reports = [(rank, step) for rank in range(3) for step in (0, 1)]
    committed = set()
    for order in itertools.permutations(reports):
        if any(order.index((rank, 0)) > order.index((rank, 1)) for rank in range(3)):
            continue
        run, commits = Run(3), []
        for rank, step in order:
            for action in run.report(rank, step, step, "staged"):
                if isinstance(action, Commit):
                    commits.append(action.step)
                    settled = Settled(step=action.step, slot=action.slot, outcome="committed")
                    commits += [a.step for a in run.commit_done(action.step, settled) if isinstance(a, Commit)]
        committed.add(tuple(commits))
    assert committed == {(0, 1)}
