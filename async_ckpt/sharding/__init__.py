"""Which part of which tensor lies on this rank, for every way in which torch wraps a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from . import dtensor, fsdp1
from .dtensor import DTensorShard
from .names import every_module, join, walk
from .replicated import BufferShard, ReplicatedShard
from .shard import Shard, Watch
from .sources import Sources

__all__ = ["Shard", "Watch", "find_shards", "reshard"]


def find_shards(model: nn.Module) -> dict[str, Shard]:
    """Every parameter and persistent buffer of the unwrapped model, by canonical name, with what this rank holds.

    Guarantee: runs no collective, reads no tensor's data, and gives the same names, shapes and dtypes on every rank
    and in every state of the wrappers: before the first forward, between steps, after an evaluation. A tensor that
    has several names comes under each of them.

    Raises CheckpointError for a parameter that cannot be mapped (DeepSpeed ZeRO-3; FSDP1 over tensor parallelism) and
    if this version of torch has not the internals that the mapping reads.
    """
    managed = dtensor.sources(model)
    for module, attributes in fsdp1.sources(model).items():
        managed.setdefault(module, {}).update(attributes)
    return {shard.name: shard for path, module in walk(model) for shard in _shards_of(path, module, managed)}


def reshard(model: nn.Module) -> None:
    """Drop every unsharded copy of parameters that FSDP still holds, so that the next forward gathers them anew.

    Call it after writing to `Shard.local()`, on every rank: FSDP keeps the root's parameters unsharded after an
    evaluation, and would compute with the old values. Runs no collective.
    """
    by_type: dict[type[nn.Module], list[nn.Module]] = defaultdict(list)
    for module in every_module(model):  # thousands, of few types
        by_type[type(module)].append(module)
    for kind, modules in by_type.items():
        if issubclass(kind, FSDPModule):
            dtensor.reshard(modules)
        elif issubclass(kind, FullyShardedDataParallel):
            fsdp1.reshard(modules)


def _shards_of(path: str, module: nn.Module, managed: Sources) -> Iterator[Shard]:
    sources = managed.get(module, {})
    for attribute, source in sources.items():
        yield source(join(path, attribute))
    for attribute, parameter in module._parameters.items():
        if parameter is None or attribute in sources or fsdp1.is_flat_parameter(attribute, parameter):
            continue
        yield _unmanaged(join(path, attribute), module, attribute, parameter)
    for attribute, buffer in module._buffers.items():
        if buffer is not None and attribute not in module._non_persistent_buffers_set:
            yield BufferShard(join(path, attribute), module._buffers, attribute, buffer)


def _unmanaged(name: str, module: nn.Module, attribute: str, parameter: torch.Tensor) -> Shard:
    if isinstance(parameter, DTensor):
        return DTensorShard(name, module, attribute, parameter)
    return ReplicatedShard(name, module, attribute, parameter)
