"""A state stays the same to the byte from topology to topology; the oracle is the checkpoint of the hop before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import ShardingStrategy, fully_shard

from tests.sharding import test_fsdp1
from tests.system.processes import Job
from tests.system.test_training_state import STATE
from tests.system.training import adamw, attach, full_values, rank, wrapped
from tests.tiny_llama import forward, no_collectives, peft_model, reference


def hsdp(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def grad_op(model: Any) -> Any:
    return test_fsdp1.wrap(model, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)


def unsharded(model: Any) -> Any:
    return test_fsdp1.wrap(model, sharding_strategy=ShardingStrategy.NO_SHARD)


BY_HAND = {"hsdp": hsdp, "grad_op": grad_op, "no_shard": unsharded}
CHAIN = [("fsdp2", 2), ("fsdp1", 3), ("ddp", 2), ("plain", 1), ("hsdp", 4), ("fsdp1_flat", 2), ("grad_op", 3),
         ("no_shard", 2), ("fsdp2", 3)]  # fmt: skip


def hop(folder: str, kind: str, number: str) -> None:
    """Restore what the hop before saved, save it again untouched, and let the next hop begin after one more step."""
    model = BY_HAND[kind](peft_model()) if kind in BY_HAND else wrapped(kind)
    optimizer = adamw(model)
    directory, place = Path(folder, "runs"), int(number)
    with attach(model, optimizer, directory=directory, timeout_s=60) as ckpt:
        with no_collectives():
            restored = ckpt.restore()
        assert (restored is None) == (place == 0)
        if restored is not None:
            assert restored.step == 10 * place - 9
            assert restored.source == "disk"
            ckpt.save(10 * place).wait()
        forward(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ckpt.save(10 * place + 1).wait()
        values = full_values(model)
    if rank() == 0:
        expected = reference(values=values)
        written = (directory / f"checkpoint-{10 * place + 1}" / "adapter_model.safetensors").read_bytes()
        assert written == expected["adapter_model.safetensors"]


def test_the_bytes_stay_the_same_from_topology_to_topology(folder: Path) -> None:
    for number, (kind, world) in enumerate(CHAIN):
        with Job("tests.system.test_topologies:hop", world, folder, kind, str(number)) as job:
            job.wait()
        if number == 0:
            continue
        before, after = (folder / "runs" / f"checkpoint-{step}" for step in (10 * number - 9, 10 * number))
        assert (before / "adapter_model.safetensors").read_bytes() == (after / "adapter_model.safetensors").read_bytes()
        old, new = (
            {n: t for n, t in safetensors.torch.load_file(path / STATE).items() if not n.startswith("rng.")}
            for path in (before, after)
        )
        assert len(old) > 0
        assert any(tensor.count_nonzero() for name, tensor in old.items() if name.endswith("exp_avg_sq"))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old), kind
