"""Every state of a model, and the moves that lead to one where a promise breaks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable

import msgspec

from tests.saver.commit_model import Model, Move


class Explored(msgspec.Struct):
    states: int
    moves: int
    ends: int


def explore(make: Callable[[], Model]) -> Explored:
    """Every state that can be reached. Raises AssertionError, with the moves that led there, where a promise breaks,
    and where from some state no end can be reached although nothing more fails."""
    first = make()
    numbers: dict[Hashable, int] = {first.key(): 0}
    came_from: list[tuple[int, Move] | None] = [None]
    backwards: dict[int, list[int]] = defaultdict(list)  # along moves that are no faults
    good: list[int] = []
    stack = [(0, first)]
    moves = 0
    while stack:
        number, model = stack.pop()
        try:
            model.check()
            if model.ended():
                model.check_end()
                good.append(number)
            for move, is_fault in list(model.moves()):
                moves += 1
                after = model.after(move)
                key = after.key()
                if key not in numbers:
                    numbers[key] = len(numbers)
                    came_from.append((number, move))
                    stack.append((numbers[key], after))
                if not is_fault:
                    backwards[numbers[key]].append(number)
        except AssertionError as error:
            raise AssertionError(f"{error}; after {_path(came_from, number)}") from error
    ends = len(good)
    reaches = set(good)
    while good:
        for before in backwards[good.pop()]:
            if before not in reaches:
                reaches.add(before)
                good.append(before)
    stuck = min(set(range(len(numbers))) - reaches, default=None)
    assert stuck is None, f"nothing fails any more, and yet it never ends; after {_path(came_from, stuck)}"
    return Explored(len(numbers), moves, ends)


def _path(came_from: list[tuple[int, Move] | None], number: int) -> list[Move]:
    path = []
    while (step := came_from[number]) is not None:
        number, move = step
        path.append(move)
    return path[::-1]
