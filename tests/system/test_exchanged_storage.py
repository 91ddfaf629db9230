"""Whoever exchanges the storage below a sharded parameter, in a way that torch itself does not use, gets no wrong file:
once the save says that it cannot tell, then it is noticed in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import async_ckpt

_STEPS = range(1, 7)


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def outcomes(
    folder: Path, write: Callable[[nn.Module, float], None], behind: Callable[[nn.Module], object] = lambda model: None
) -> list[str]:
    """What becomes of each save of a model whose parameters `write` has set to the step's number; `behind` is called
    as soon as `save` has returned."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model)
    found = []
    with async_ckpt.attach(model, directory=folder, weights="trainable", timeout_s=60) as ckpt:
        for step in _STEPS:
            write(model, float(step))
            handle = ckpt.save(step)
            behind(model)
            try:
                saved = load_file(handle.wait() / "model.safetensors")
            except async_ckpt.CheckpointError as error:
                found.append("said" if "exchanged since the last save" in str(error) else str(error))
            else:
                assert len(saved) == 4
                right = all(bool((tensor == step).all()) for tensor in saved.values())
                found.append("right" if right else "wrong")
    return found


def exchange(model: Any, value: float) -> None:
    for parameter in model.parameters():
        local = parameter._local_tensor
        local.data = torch.full_like(local, value)


def in_place(model: Any, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter._local_tensor.fill_(value)


def through_torch(model: Any, value: float) -> None:
    model._apply(lambda tensor: torch.full_like(tensor, value))


def test_storage_exchanged_below_the_parameter(folder: Path) -> None:
    # Only a save that may begin before anything is known trusts the objects: all but the first.
    assert outcomes(folder, exchange) == ["said", *["right"] * 5]


@pytest.mark.parametrize("write", [in_place, through_torch])
def test_what_torch_does_by_itself_is_right_at_once(folder: Path, write: Callable[[nn.Module, float], None]) -> None:
    assert outcomes(folder, write) == ["right"] * len(_STEPS)


def test_torch_may_move_parameters_right_behind_a_save(folder: Path) -> None:
    assert outcomes(folder, in_place_anew, lambda model: through_torch(model, -7.0)) == ["right"] * len(_STEPS)


def in_place_anew(model: Any, value: float) -> None:
    through_torch(model, 0.0)
    in_place(model, value)
