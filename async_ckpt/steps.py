"""Which optimizer step the training is at, and what number a save of it would have got from the user."""

from __future__ import annotations

from weakref import WeakSet

import torch

_NEAR = 0.05  # how far a ratio of numbers to steps may be from a whole one to be taken for it


class Boundaries:
    """Where one step of the training ends and the next begins, whatever it is made of: one optimizer, several in turn,
    or one for each parameter, stepping in backward. A new step begins when an optimizer steps that has already stepped
    in the present one."""

    def __init__(self) -> None:
        self._stepped: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._any = False

    def begins(self, optimizer: torch.optim.Optimizer) -> bool:
        """`optimizer` is about to step: whether that begins a new step of the training. Changes nothing."""
        return not self._any or optimizer in self._stepped

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer` steps."""
        if self.begins(optimizer):
            self._stepped = WeakSet()
        self._stepped.add(optimizer)
        self._any = True


class Numbers:
    """The numbers that the user gave to saves, against optimizer steps: what a step between two saves would be called.

    Loops count from 0, and go on at `resumed.step + 1`; with gradient accumulation the number may grow by more than one
    a step. All ranks save and restore alike, so all of them come to the same number.
    """

    def __init__(self) -> None:
        self._marks = [(0, -1)]
        self._given = False  # whether the marks were all given by the user

    def restored(self, steps: int, number: int) -> None:
        """`number` was restored when `steps` optimizer steps had begun here."""
        self._marks, self._given = [(steps, number)], number >= 0

    def saved(self, steps: int, number: int) -> None:
        if not self._given:
            self._marks.clear()
        if self._marks and self._marks[-1][0] == steps:
            self._marks.pop()
        self._marks, self._given = [*self._marks[-1:], (steps, number)], True

    def of(self, steps: int) -> int:
        """What a save after `steps` optimizer steps would be called."""
        last_steps, last_number = self._marks[-1]
        return last_number + int(self._growth() * (steps - last_steps))

    def _growth(self) -> float:
        if len(self._marks) < 2:
            return 1.0
        (steps, number), (later_steps, later_number) = self._marks
        growth = (later_number - number) / (later_steps - steps)
        whole = round(growth)
        return float(whole) if whole > 0 and abs(growth - whole) <= _NEAR * whole else growth
