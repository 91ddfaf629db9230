"""What an optimizer will keep, foretold before its first step; the oracle is what it then keeps, and torch's names."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from async_ckpt.core.errors import CheckpointError
from async_ckpt.optimizer_state import (
    GroupNames,
    NotByElements,
    StateShard,
    check_groups,
    describe,
    finish,
    load_groups,
    materialise,
    state_shards,
)
from async_ckpt.sharding import find_shards
from tests.tiny_llama import forward, peft_model, train

# Those that say why not; every other optimizer of torch must be foretold.
REFUSED = {
    "LBFGS": "closure",
    "SparseAdam": "dense gradients",
}


def optimizer_classes() -> list[type[torch.optim.Optimizer]]:
    found = [getattr(torch.optim, name) for name in sorted(torch.optim.__all__)]
    kinds = [each for each in found if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer)]
    return [kind for kind in kinds if kind is not torch.optim.Optimizer]


def variants() -> list[Any]:
    cases = [pytest.param(kind, {}, id=kind.__name__) for kind in optimizer_classes()]
    cases += [
        pytest.param(torch.optim.SGD, {"momentum": 0.9}, id="SGD-momentum"),
        pytest.param(torch.optim.AdamW, {"amsgrad": True}, id="AdamW-amsgrad"),
        pytest.param(torch.optim.AdamW, {"fused": True}, id="AdamW-fused"),
        pytest.param(torch.optim.AdamW, {"foreach": True}, id="AdamW-foreach"),
        pytest.param(torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, id="RMSprop-centered"),
        pytest.param(torch.optim.AdamW, {"lr": torch.tensor(0.01)}, id="AdamW-tensor-lr"),
    ]
    return cases


def trainable(model: Any, kind: type[torch.optim.Optimizer]) -> list[torch.nn.Parameter]:
    return [
        p
        for p in model.parameters()
        if p.requires_grad and (kind is not getattr(torch.optim, "Muon", None) or p.dim() == 2)
    ]


def step(model: Any, optimizer: torch.optim.Optimizer) -> float:
    loss = forward(model)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_there_are_optimizers() -> None:
    assert len(optimizer_classes()) >= 13


@pytest.mark.parametrize(("kind", "options"), variants())
def test_the_state_is_foretold(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    model = peft_model()
    optimizer = kind(trainable(model, kind), **options)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if kind.__name__ in REFUSED:
        with pytest.raises(NotByElements, match=REFUSED[kind.__name__]):
            state_shards(optimizer, find_shards(model))
        return
    foretold = {shard.name: shard for shard in state_shards(optimizer, find_shards(model))}
    assert not optimizer.state or kind is torch.optim.Adagrad, "the real optimizer was touched"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for _ in range(2):
        step(model, optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {
        f"state.{names[id(parameter)]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    assert kept.keys() == foretold.keys()
    for name, value in kept.items():
        local = foretold[name].local()
        assert (tuple(local.shape), local.dtype) == (tuple(value.shape), value.dtype), name
        assert torch.equal(local, value), name


def test_the_names_are_torchs_own() -> None:
    model = peft_model()
    optimizer = torch.optim.AdamW(trainable(model, torch.optim.AdamW))
    step(model, optimizer)
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    ours = {shard.name: shard.local() for shard in state_shards(optimizer, find_shards(model))}
    theirs = {name: value for name, value in flat.items() if name.startswith("state.")}
    assert len(theirs) > 0
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], torch.as_tensor(theirs[name])) for name in ours)


class Counting(torch.optim.Optimizer):
    """Keeps a Python number, as optimizers outside of torch do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                parameter.add_(parameter.grad, alpha=-group["lr"] / state["count"])


def copied(shards: list[StateShard]) -> dict[str, torch.Tensor]:
    return {shard.name: shard.local().clone() for shard in shards}


@pytest.mark.parametrize("make", [Counting, torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
                                  lambda p: torch.optim.Adafactor(p, lr=0.1)])  # fmt: skip
def test_the_state_goes_on_where_it_was(make: Any) -> None:
    model = peft_model()
    optimizer = make(trainable(model, torch.optim.AdamW))
    shards = state_shards(optimizer, find_shards(model))
    for _ in range(2):
        step(model, optimizer)
    saved, weights = copied(shards), [p.detach().clone() for p in model.parameters()]
    expected = [step(model, optimizer) for _ in range(3)]

    other = peft_model()
    with torch.no_grad():
        for parameter, weight in zip(other.parameters(), weights, strict=True):
            parameter.copy_(weight)
    resumed = make(trainable(other, torch.optim.AdamW))
    targets = state_shards(resumed, find_shards(other))
    materialise(targets)
    for shard in targets:
        if shard.entry.kind != "number":
            shard.local().copy_(saved[shard.name])
    finish(targets, {name: value for name, value in saved.items() if value.dtype == torch.int64})
    assert [step(other, resumed) for _ in range(3)] == expected


def test_an_optimizer_that_had_not_begun_has_no_state_after_restore() -> None:
    model = peft_model()
    optimizer = torch.optim.AdamW(trainable(model, torch.optim.AdamW))
    shards = state_shards(optimizer, find_shards(model))
    assert all(shard.local().count_nonzero() == 0 for shard in shards)
    materialise(shards)
    assert len(optimizer.state) > 0
    finish(shards, {})
    assert not optimizer.state


def test_parameters_of_another_model_are_refused() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3, 2))])
    with pytest.raises(CheckpointError, match=r"1 parameters that are not in the model \(shapes \[3, 2\]\)"):
        state_shards(optimizer, find_shards(peft_model()))


def test_a_state_of_another_shape_is_refused_by_name() -> None:
    model = peft_model()
    optimizer = torch.optim.AdamW(trainable(model, torch.optim.AdamW))
    shards = state_shards(optimizer, find_shards(model))
    train(model)
    step(model, optimizer)
    shard = next(shard for shard in shards if shard.key == "exp_avg")
    parameter = shard.source.parameter
    assert parameter is not None
    optimizer.state[parameter]["exp_avg"] = torch.ones(1, 1, 1)
    with pytest.raises(CheckpointError, match=shard.name):
        shard.local()


def test_groups_are_matched_by_the_names_of_their_parameters() -> None:
    model = peft_model()
    parameters = trainable(model, torch.optim.AdamW)
    names = GroupNames(find_shards(model))
    two = torch.optim.AdamW(
        [{"params": parameters[:3], "lr": 0.5}, {"params": parameters[3:], "lr": torch.tensor(0.25)}]
    )
    saved = describe([two], names)
    other = torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:], "lr": torch.tensor(1.0)}])
    rate = other.param_groups[1]["lr"]
    assert check_groups([other], names, saved) == []
    load_groups([other], saved)
    assert other.param_groups[0]["lr"] == 0.5
    assert other.param_groups[1]["lr"] is rate
    assert float(rate) == 0.25
    assert other.param_groups[0]["betas"] == (0.9, 0.999)
    one = torch.optim.AdamW(parameters)
    assert "other parameters" in check_groups([one], names, saved)[0]
    assert (
        "is a AdamW in the checkpoint, a SGD here" in check_groups([torch.optim.SGD(parameters, lr=1)], names, saved)[0]
    )
    assert "1 optimizers in the checkpoint, 2 here" in check_groups([one, two], names, saved)[0]
