"""Meshes of two dimensions on four ranks: replicas and shards, tensor parallelism with and without FSDP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.sharding import test_fsdp1
from tests.system.processes import run_cases
from tests.system.training import attach, check_checkpoint, everywhere, no_collectives, rank, reference
from tests.tiny_llama import lora, peft_model

CONFIG = functools.partial(lora, r=6, rank_pattern={})


def layers(model: Any) -> nn.ModuleList:
    found: nn.ModuleList = model.base_model.model.model.layers
    return found


def tensor_parallel(model: Any, mesh: Any) -> Any:
    """The adapters as Megatron cuts them: lora_A by rows for what comes in, lora_B by columns for what goes out."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            parallelize_module(module.lora_A["default"], mesh, RowwiseParallel())
            parallelize_module(module.lora_B["default"], mesh, ColwiseParallel())
    return model


def tp(model: Any) -> Any:
    return tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def tp_fsdp2(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    for layer in layers(model):
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def hsdp(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hybrid(model: Any, strategy: ShardingStrategy) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return test_fsdp1.wrap(model, sharding_strategy=strategy, device_mesh=mesh)


def ignoring(model: Any) -> Any:
    """Some adapters are left out of FSDP, whole on every rank."""
    left_out = {p for name, p in model.named_parameters() if "layers.0" in name and "lora_" in name}
    assert len(left_out) > 0
    for layer in layers(model):
        fully_shard(layer, ignored_params=left_out)
    return fully_shard(model, ignored_params=left_out)


def saves_and_restores(folder: Path, wrap: Callable[[Any], Any]) -> None:
    model = wrap(peft_model(CONFIG()))
    with attach(model, directory=folder, timeout_s=60, verify_replicas=True) as ckpt:
        with no_collectives():
            path = ckpt.save(1).wait()
        if rank() == 0:
            check_checkpoint(path, reference(CONFIG()), 1)
        local = {
            name: p._local_tensor if isinstance(p, DTensor) else p.data
            for name, p in model.named_parameters()
            if "lora_" in name
        }
        before = {name: tensor.clone() for name, tensor in local.items()}
        assert len(before) > 0
        everywhere(0)
        for tensor in local.values():
            tensor.zero_()
        with no_collectives():
            assert ckpt.restore(path) is not None
        assert all(torch.equal(local[name], tensor) for name, tensor in before.items())


CASES: dict[str, Callable[[Path], None]] = {
    "tp": functools.partial(saves_and_restores, wrap=tp),
    "tp_fsdp2": functools.partial(saves_and_restores, wrap=tp_fsdp2),
    "hsdp": functools.partial(saves_and_restores, wrap=hsdp),
    "hybrid_shard": functools.partial(
        saves_and_restores, wrap=functools.partial(hybrid, strategy=ShardingStrategy.HYBRID_SHARD)
    ),
    "hybrid_shard_zero2": functools.partial(
        saves_and_restores, wrap=functools.partial(hybrid, strategy=ShardingStrategy._HYBRID_SHARD_ZERO2)
    ),
    "ignored_params": functools.partial(saves_and_restores, wrap=ignoring),
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("case", CASES)
def test_meshes(results: dict[str, str], folder: Path, case: str) -> None:
    if not results:
        results.update(run_cases("tests.system.test_meshes", list(CASES), 4, folder))
    if results[case]:
        pytest.fail(results[case], pytrace=False)
