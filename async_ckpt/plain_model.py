"""The parameters of any module, by their own names: for models that neither PEFT nor transformers knows."""

from __future__ import annotations

from typing import Literal

from torch import nn

from async_ckpt.core.errors import CheckpointError

from .contents import Contents, NamedTensor, check_storable
from .sharding import Shard, find_shards

FILE = "model.safetensors"

Weights = Literal["auto", "trainable", "all"]


def plan_plain_model(model: nn.Module, weights: Weights) -> Contents:
    """`model.safetensors` with canonical names, which are those of `state_dict()` of the unwrapped module.

    "trainable": the parameters that require gradients; "all": also frozen ones and persistent buffers. Runs no
    collective. Raises CheckpointError if there are none, and for one that cannot be copied.
    """
    shards = find_shards(model)
    chosen = {name: shard for name, shard in shards.items() if weights == "all" or _is_trained(shard)}
    if not chosen:
        raise CheckpointError(f"weights={weights!r}: the {type(model).__name__} has no such parameters")
    tensors = tuple(NamedTensor(name, shard) for name, shard in chosen.items())
    for tensor in tensors:
        check_storable(tensor, "model")
    return Contents({FILE: tensors}, {})


def _is_trained(shard: Shard) -> bool:
    return shard.parameter is not None and shard.parameter.requires_grad
