"""AdaLoRA once its ranks were reduced: PEFT then saves selected rows and columns.

`rank_pattern` says, for each `lora_E`, which of its rows are kept: `lora_E[kept]`, `lora_A[kept]`, `lora_B[:, kept]`
(`AdaLoraModel.resize_state_dict_by_rank_pattern`). Selecting keeps the order, so what a rank holds of a tensor becomes
one part of the selected tensor, a box or a run as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from async_ckpt.core.region import Region

from .sharding import Shard
from .sharding.names import WRAPPED_CHILDREN
from .special_tuners import kind_of

_ROWS, _COLUMNS = 0, 1
_DIMENSIONS = {"lora_E": _ROWS, "lora_A": _ROWS, "lora_B": _COLUMNS}

Pattern = dict[str, list[bool]]


def plain_pattern(pattern: Mapping[str, Sequence[bool]], adapter_name: str) -> Pattern:
    """The pattern as PEFT writes it into adapter_config.json: without the adapter's name, and without the wrappers that
    FSDP1 and activation checkpointing put between the modules."""
    plain = {}
    for name, kept in pattern.items():
        parts = [part for part in name.replace(f".{adapter_name}", "").split(".") if part not in WRAPPED_CHILDREN]
        plain[".".join(parts)] = [bool(each) for each in kept]
    return plain


class Selection:
    """Which tensors of the file are reduced, and to what."""

    def __init__(self, pattern: Pattern) -> None:
        # "model.layers.0.q_proj.lora_E" -> "base_model.model.model.layers.0.q_proj", below which all three lie.
        self._kept = {f"base_model.model.{name.rpartition('.')[0]}": kept for name, kept in pattern.items()}

    def apply(self, name: str, shard: Shard) -> Shard:
        """`shard`, or the selected part of it, for the tensor `name` of the file."""
        module, _, attribute = name.rpartition(".")
        kept = self._kept.get(module)
        dimension = _DIMENSIONS.get(attribute)
        if kept is None or dimension is None or sum(kept) == shard.shape[dimension]:
            return shard
        return SelectedShard(shard, dimension, kept)


class SelectedShard(Shard):
    """The kept rows or columns of a tensor, copied out anew at each save, before it returns."""

    def __init__(self, shard: Shard, dimension: int, kept: Sequence[bool]) -> None:
        mask = torch.tensor(kept, dtype=torch.bool)
        shape = list(shard.shape)
        shape[dimension] = int(mask.sum())
        region, index = _selected(shard.shape, shard.region, dimension, mask)
        super().__init__(shard.name, tuple(shape), shard.dtype, region)
        self._shard = shard
        self._dimension = 0 if shard.region.flat else dimension
        self._index = index

    @property
    def is_settled(self) -> bool:
        return self._shard.is_settled

    def local(self) -> torch.Tensor:
        local = self._shard.local()
        if self._index.device != local.device:
            self._index = self._index.to(local.device)
        return local.index_select(self._dimension, self._index).view(self.region.sizes)


def _selected(
    shape: tuple[int, ...], region: Region, dimension: int, mask: torch.Tensor
) -> tuple[Region, torch.Tensor]:
    """The part of the selected tensor that `region` becomes, and which of the part's entries are kept."""
    if not region.flat:
        start, size = region.offsets[dimension], region.sizes[dimension]
        index = mask[start : start + size].nonzero().view(-1)
        offsets, sizes = list(region.offsets), list(region.sizes)
        offsets[dimension], sizes[dimension] = int(mask[:start].sum()), index.numel()
        return Region(False, tuple(offsets), tuple(sizes)), index
    stride = math.prod(shape[dimension + 1 :])
    start, size = region.offsets[0], region.sizes[0]
    kept = mask[torch.arange(start + size).div(stride, rounding_mode="floor") % shape[dimension]]
    index = kept[start:].nonzero().view(-1)
    return Region.run(int(kept[:start].sum()), index.numel()), index


def reduced_pattern(config: Any, adapter_name: str) -> Pattern | None:
    """The plain pattern of an AdaLoRA adapter whose ranks were reduced; None for anything else."""
    pattern = getattr(config, "rank_pattern", None) if kind_of(config) == "ADALORA" else None
    return plain_pattern(pattern, adapter_name) if pattern is not None else None


def version(config: Any) -> object:
    """Changes when PEFT would save other tensors than before."""
    return repr(config.rank_pattern) if kind_of(config) == "ADALORA" else None
