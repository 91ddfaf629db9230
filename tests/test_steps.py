"""What counts as a step of training, and what it is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from async_ckpt.steps import Boundaries, Numbers


def counted(train: Callable[[], None]) -> int:
    """How many steps of training `train` makes, as the hook sees them."""
    boundaries, count = Boundaries(), 0

    def before(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        nonlocal count
        count += boundaries.begins(optimizer)
        boundaries.step(optimizer)

    hook = register_optimizer_step_pre_hook(before)
    try:
        train()
    finally:
        hook.remove()
    return count


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def backward(net: nn.Module) -> None:
    net(torch.ones(4, 2)).sum().backward()


def test_one_optimizer() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())

    def train() -> None:
        for _ in range(5):
            backward(net)
            optimizer.step()

    assert counted(train) == 5


def test_several_in_turn_are_one_step() -> None:
    net = model()
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net)

    def train() -> None:
        for number in range(6):
            backward(net)
            first.step()
            if number % 2:  # not in every step
                second.step()

    assert counted(train) == 6


def test_the_first_one_may_be_given_up() -> None:
    net = model()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net]

    def train() -> None:
        for number in range(6):
            backward(net)
            if number == 3:
                del optimizers[0]
            for optimizer in optimizers:
                optimizer.step()

    assert counted(train) == 6


def test_optimizers_in_backward_are_one_step() -> None:
    net = model()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in net.parameters()}
    assert len(optimizers) == 4
    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(lambda each: optimizers[each].step())

    def train() -> None:
        for _ in range(5):
            backward(net)

    assert counted(train) == 5


@pytest.mark.parametrize(
    ("marks", "steps", "number"),
    [
        ([], 6, 5),  # a fresh loop counts from 0
        ([(6, 5)], 8, 7),
        ([(6, 6)], 8, 8),  # one that counts from 1
        ([(25, 100), (50, 200)], 60, 240),  # four numbers a step: gradient accumulation
        ([(25, 99), (50, 199)], 51, 203),
        ([(100, 100), (199, 200)], 210, 211),  # nearly one: a step was left out
        ([(1000, 0), (2000, 1)], 2900, 1),  # epochs
        ([(10, 5), (10, 7)], 12, 9),
    ],
)
def test_numbers_go_on_as_the_user_began(marks: list[tuple[int, int]], steps: int, number: int) -> None:
    numbers = Numbers()
    for mark in marks:
        numbers.saved(*mark)
    assert numbers.of(steps) == number


def test_a_restored_number_is_one_that_was_given() -> None:
    numbers = Numbers()
    numbers.restored(0, 4000)
    assert numbers.of(3) == 4003
    numbers.saved(100, 4400)
    assert numbers.of(110) == 4440
    numbers.restored(110, -1)  # of a checkpoint without a number, training begins at 0
    assert numbers.of(115) == 4
    numbers.saved(120, 30)
    assert numbers.of(121) == 31
