"""Models whose tensors lie whole on every rank: plain, DDP, and what of a wrapped model is not sharded."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.region import Region
from async_ckpt.sharding import Shard, find_shards, reshard
from tests.ranks import run_cases
from tests.tiny_llama import (
    Case,
    check_plan,
    check_saved,
    evaluate,
    peft_model,
    reference,
    train,
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.again = self.first
        self.second = nn.Linear(3, 2)
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_every_name_of_a_tensor_appears() -> None:
    model = Tied()
    shards = find_shards(model)
    assert shards.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        shard = shards[name]
        assert (shard.name, shard.shape, shard.dtype) == (name, tuple(tensor.shape), tensor.dtype)
        assert shard.region == Region.whole(tuple(tensor.shape))
        assert shard.is_buffer == (name == "kept")
        assert shard.local().data_ptr() == tensor.data_ptr()
        assert not shard.local().requires_grad


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: nn.Sequential(torch.compile(model))])
def test_names_do_not_depend_on_wrappers(wrap: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wrapped = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), torch.compile(checkpoint_wrapper(nn.Linear(2, 2))))
    prefix = "0." if isinstance(wrap(plain), nn.Sequential) else ""
    assert find_shards(wrap(wrapped)).keys() == {prefix + name for name in plain.state_dict()}


def shard_of(module: nn.Module, name: str = "weight") -> Shard:
    return find_shards(module)[name]


def test_a_view_is_kept_until_the_storage_moves() -> None:
    linear = nn.Linear(3, 2)
    shard = shard_of(linear)
    view = shard.local()
    assert shard.local() is view
    with torch.no_grad():
        linear.weight.fill_(4)
    assert bool((shard.local() == 4).all())
    linear.weight.data = torch.full((2, 3), 5.0)
    assert shard.local() is not view
    assert shard.local() is shard.local()
    assert bool((shard.local() == 5).all())
    shard.local().fill_(6)
    assert bool((linear.weight == 6).all())


def test_a_new_parameter_is_refused() -> None:
    linear = nn.Linear(3, 2)
    shard = shard_of(linear)
    shard.local()
    linear.load_state_dict({name: value.clone() for name, value in linear.state_dict().items()}, assign=True)
    with pytest.raises(CheckpointError, match=r"'weight' is no longer the tensor.*attach again"):
        shard.local()


@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
def test_a_new_dtype_is_refused(shape: tuple[int, int]) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(shape))
    shard = shard_of(module)
    shard.local()
    module.to(torch.float16)
    with pytest.raises(CheckpointError, match=r"'weight' had dtype torch\.float32.*torch\.float16 now"):
        shard.local()


def test_a_new_shape_is_refused() -> None:
    linear = nn.Linear(3, 2)
    shard = shard_of(linear)
    linear.weight.data = torch.ones(2, 4)
    with pytest.raises(CheckpointError, match=r"'weight' had local shape \(2, 3\).*\(2, 4\) now"):
        shard.local()


def test_a_buffer_may_be_bound_anew() -> None:
    model = Tied()
    shard = shard_of(model, "kept")
    shard.local()
    model.kept = torch.full((2,), 7.0)
    assert bool((shard.local() == 7).all())
    del model.kept
    with pytest.raises(CheckpointError, match="'kept' is no longer"):
        shard.local()


def test_zero_3_is_refused() -> None:
    linear = nn.Linear(3, 2)
    linear.weight.ds_tensor = torch.ones(6)
    with pytest.raises(CheckpointError, match=r"'weight' is partitioned by DeepSpeed ZeRO-3"):
        find_shards(linear)


def test_a_model_on_meta_is_described() -> None:
    with torch.device("meta"):
        shards = find_shards(Tied())
    assert shards["first.weight"].shape == (2, 3)


def test_local_is_cheap() -> None:
    """It is called for more than a thousand tensors in each save."""
    shards = list(find_shards(nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)))).values())
    passes_s = []
    for _ in range(20):
        start_s = time.perf_counter()
        for shard in shards:
            shard.local()
        passes_s.append(time.perf_counter() - start_s)
    assert min(passes_s) / len(shards) < 5e-6


def ddp() -> None:
    model = DistributedDataParallel(peft_model())
    fresh = reference()
    plan = check_saved(model, fresh)
    assert all(tensor.shard.region == Region.whole(tensor.shard.shape) for tensor in plan.tensors)
    train(model)
    values = {n.removeprefix("module."): p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trained = reference(values=values)
    check_plan(plan, trained)
    evaluate(model)
    reshard(model)
    check_saved(torch.compile(model, backend="eager"), trained)


def parameters_that_fsdp_ignores() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    for wrap in (
        lambda model, head: FullyShardedDataParallel(
            model, ignored_modules=[head], use_orig_params=True, device_id=torch.device("cpu")
        ),
        lambda model, head: fully_shard(model, ignored_params=set(head.parameters())),
    ):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        shards = find_shards(wrap(model, model[1]))
        assert shards["1.weight"].region == Region.whole((3, 4))
        assert 0 < shards["0.weight"].region.numel < 16


CASES: dict[str, Case] = {"ddp": ddp, "parameters_that_fsdp_ignores": parameters_that_fsdp_ignores}


def test_two_ranks() -> None:
    assert not dist.is_initialized()
    assert run_cases("tests.sharding.test_replicated", list(CASES), world=2, timeout_s=280) == dict.fromkeys(CASES, "")
