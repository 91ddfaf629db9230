"""A training loop that keeps its core busy: arithmetic, Python, and an optimizer step that writes to all parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_SAVE_AT = 2
_ARITHMETIC_S = 0.020
_PYTHON_S = 0.010


@dataclass(frozen=True)
class Run:
    total_s: float
    step_s: float  # the median


class Loop:
    """The amount of work is fixed when it is made, so that interference shows as time. It holds the GIL for a part of
    each step, as launching kernels does."""

    def __init__(self, parameters: Sequence[torch.Tensor], *, steps: int) -> None:
        self._parameters = list(parameters)
        self._steps = steps
        self._matrix = torch.rand(256, 256)
        self._products = _repeat(_ARITHMETIC_S, self._arithmetic)
        self._rounds = _repeat(_PYTHON_S, self._python)

    def run(self, save: Callable[[], None] | None, fence: Callable[[], None]) -> Run:
        """`save` is called behind the third step; `fence` in front of each step's writes."""
        started_s = time.perf_counter()
        steps_s = []
        for step in range(self._steps):
            began_s = time.perf_counter()
            self._arithmetic(self._products)
            self._python(self._rounds)
            fence()
            torch._foreach_add_(self._parameters, 0.0)
            if save is not None and step == _SAVE_AT:
                save()
            steps_s.append(time.perf_counter() - began_s)
        return Run(time.perf_counter() - started_s, sorted(steps_s)[len(steps_s) // 2])

    def _arithmetic(self, products: int) -> None:
        for _ in range(products):
            torch.mm(self._matrix, self._matrix)

    def _python(self, rounds: int) -> None:
        total = 0
        for number in range(rounds):
            total += number


def _repeat(seconds: float, work: Callable[[int], None]) -> int:
    """How much of `work` takes `seconds`."""
    amount = 1
    while True:
        started_s = time.perf_counter()
        work(amount)
        taken_s = time.perf_counter() - started_s
        if taken_s > seconds / 2:
            return max(1, round(amount * seconds / taken_s))
        amount *= 2
