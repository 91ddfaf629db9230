"""The promises of the commit protocol, in every state that ranks, savers, crashes and late messages can lead to.

How many states there are is asserted: a model that explores less shows less.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from async_ckpt_saver.run import Run
from tests.saver.commit_model import Faults, Model
from tests.saver.exploration import Explored, explore


def explored(world: int, steps: int, **faults: int) -> Explored:
    none = {"deaths": 0, "saver_deaths": 0, "io_errors": 0, "not_staged": 0}
    return explore(lambda: Model(world, steps, Faults(**none | faults)))


@pytest.mark.parametrize(
    ("world", "steps", "faults", "states"),
    [
        (1, 3, {"deaths": 1, "saver_deaths": 1, "io_errors": 1, "not_staged": 1}, 13_838),
        (2, 2, {"deaths": 2, "saver_deaths": 2, "io_errors": 1}, 19_984),
        (2, 3, {"deaths": 1, "saver_deaths": 1}, 11_604),
        pytest.param(
            2, 2, {"deaths": 1, "saver_deaths": 1, "io_errors": 1, "not_staged": 1}, 46_466, marks=pytest.mark.full
        ),
        pytest.param(2, 3, {"saver_deaths": 1, "not_staged": 1}, 43_948, marks=pytest.mark.full),
        pytest.param(3, 2, {"deaths": 1, "saver_deaths": 1}, 38_762, marks=pytest.mark.full),
    ],
)
def test_every_state_keeps_the_promises(world: int, steps: int, faults: dict[str, int], states: int) -> None:
    """Nothing torn, nothing acknowledged lost, nothing that all had staged dropped, and an end from everywhere."""
    found = explored(world, steps, **faults)
    assert (found.states, found.ends > 100) == (states, True)


def all_that_is_settled(self: Run, slot: int) -> int:
    return max((each.step for each in self._settled.values() if each.slot == slot), default=-1)


def nothing_is_known(self: Run, settled: object) -> None:
    """A committed step is not taken up from the disk."""


def hasty(self: Run, entry: object, original: Callable[..., object] = Run._advance) -> object:
    entry.staged.update(range(self.world))  # type: ignore[attr-defined]
    return original(self, entry)


def deaf(self: Run, rank: int, reason: str) -> list[object]:
    return []


@pytest.mark.parametrize(
    ("name", "broken", "faults"),
    [
        ("told", all_that_is_settled, {"saver_deaths": 1, "not_staged": 1}),
        ("told", lambda self, slot: -1, {"saver_deaths": 1, "io_errors": 1}),
        ("know", nothing_is_known, {"saver_deaths": 1}),
        ("_advance", hasty, {"not_staged": 1}),
        ("leave", deaf, {"deaths": 1}),
    ],
)
def test_the_exploration_sees_a_broken_machine(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: object, faults: dict[str, int]
) -> None:
    monkeypatch.setattr(Run, name, broken)
    with pytest.raises(AssertionError, match="after"):
        _ = [explored(world, steps, **faults) for world, steps in ((1, 3), (2, 2))]


def test_the_exploration_sees_a_saver_that_believes_the_order_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look into the journal a report that is said again after a later one loses a step."""
    monkeypatch.setattr(
        Model, "_deliver", lambda self, number, step, report: self._take(
            self._machine().report(number, step % 2, step, report)
        )
    )  # fmt: skip
    with pytest.raises(AssertionError, match=r"every rank had staged step 0, and yet it was \{'skipped'\}"):
        explored(2, 2, saver_deaths=1)
