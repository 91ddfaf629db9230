"""Whatever may move or be replaced between two saves is noticed, and nothing is looked up anew while nothing has."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from async_ckpt.core.errors import CheckpointError
from async_ckpt.lookup import Lookup
from async_ckpt.optimizer_state import state_shards
from async_ckpt.sharding import find_shards


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def lookup_of(model: nn.Module) -> Lookup:
    return Lookup(list(find_shards(model).values()))


def test_while_nothing_moves_it_is_the_same_list() -> None:
    model = layers()
    lookup = lookup_of(model)
    views = lookup.views()
    assert len(views) == 4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert lookup.check()
    assert lookup.views() is views
    assert all(map(torch.equal, views, model.parameters()))


@pytest.mark.parametrize(
    "move",
    [
        lambda model: setattr(model[1].weight, "data", torch.full((4, 4), 7.0)),
        lambda model: model.double().float(),
        lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
    ],
    ids=["data", "to", "load_state_dict"],
)
def test_what_moves_is_found_again_and_what_was_taken_stays(move: Callable[[nn.Module], object]) -> None:
    model = layers()
    lookup = lookup_of(model)
    before = [view.clone() for view in lookup.views()]
    taken = lookup.views()
    in_place = [parameter.data_ptr() for parameter in model.parameters()]
    move(model)
    moved = [parameter.data_ptr() for parameter in model.parameters()] != in_place
    assert moved == (lookup.views() is not taken)
    assert all(map(torch.equal, lookup.views(), model.parameters()))
    if moved:
        assert all(map(torch.equal, taken, before))
    assert lookup.check()


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: setattr(model[1], "weight", nn.Parameter(torch.zeros(4, 4))),
        lambda model: model.load_state_dict(model.state_dict(), assign=True),
        lambda model: model.half(),
        lambda model: delattr(model[0], "bias"),
    ],
    ids=["setattr", "assign", "half", "delattr"],
)
def test_what_was_replaced_or_converted_is_an_error(replace: Callable[[nn.Module], object]) -> None:
    model = layers()
    lookup = lookup_of(model)
    replace(model)
    with pytest.raises(CheckpointError, match=r"no longer the tensor|had dtype"):
        lookup.check() and lookup.views()


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def replace_one_state(optimizer: torch.optim.Optimizer) -> None:
    parameter = optimizer.param_groups[0]["params"][1]
    optimizer.state[parameter] = {key: value + 1 for key, value in optimizer.state[parameter].items()}


def replace_one_tensor(optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    state["exp_avg"] = state["exp_avg"] + 1


@pytest.mark.parametrize(
    "replace",
    [
        lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
        replace_one_state,
        replace_one_tensor,
        lambda optimizer: optimizer.state.clear(),
        lambda optimizer: optimizer.state.popitem(),
    ],
    ids=["load_state_dict", "one state", "one tensor", "clear", "pop"],
)
def test_a_new_optimizer_state_is_found(replace: Callable[[torch.optim.Optimizer], object]) -> None:
    model, optimizer = stepped()
    shards = state_shards(optimizer, find_shards(model))
    lookup = Lookup(shards)
    assert len(lookup.views()) == 12
    step(model, optimizer)
    assert lookup.check()
    replace(optimizer)
    assert not lookup.check()
    assert all(view is shard.local() for view, shard in zip(lookup.views(), shards, strict=True))


def test_before_the_first_step_there_is_nothing_to_rely_on() -> None:
    model = layers()
    optimizer = torch.optim.AdamW(model.parameters())
    lookup = Lookup(state_shards(optimizer, find_shards(model)))
    assert not any(view.count_nonzero() for view in lookup.views())
    step(model, optimizer)
    assert not lookup.check()
    assert all(view.count_nonzero() for view in lookup.views())
    assert lookup.check()


def python_calls(work: Callable[[], object]) -> int:
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_it_takes_as_many_python_calls_for_many_tensors_as_for_few() -> None:
    few, many = (lookup_of(nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))) for count in (1, 50))
    for lookup in (few, many):
        assert lookup.check()
    assert 0 < python_calls(few.views) == python_calls(many.views) < 8
    assert 0 < python_calls(few.check) == python_calls(many.check) < 5
