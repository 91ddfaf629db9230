"""What a checkpoint of this model consists of, and which of it lies on this rank. Made once, at attach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import xxhash

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import FileLayout, TensorSpec, plan_file
from async_ckpt.core.manifest import checkpoint_name
from async_ckpt.core.protocol import Claim, ImageFile, Layout, SaveRecord

from .adapter import SAFETENSORS_DTYPE, plan_adapter
from .restore import Target
from .sharding import Shard
from .staging import Part

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Plan:
    """`targets` are all tensors by file, for restore. `claims` and `parts` run in parallel: what this rank holds, as
    the saver is told and as it is copied if the saver grants it."""

    layout: Layout
    targets: dict[str, tuple[Target, ...]]
    claims: list[Claim]
    parts: list[Part]

    @property
    def layout_hash(self) -> str:
        digest = xxhash.xxh3_128()
        for file in self.layout.files:
            digest.update(file.path.encode() + b"\0" + file.header)
        return digest.hexdigest()


def plan_checkpoint(model: torch.nn.Module, adapter_name: str, *, rank: int) -> Plan:
    """Runs no collective. Raises CheckpointError if the model has nothing that could be saved under that name."""
    adapter = plan_adapter(model, adapter_name, documents=rank == 0)
    path = f"{adapter.subfolder}/{ADAPTER_FILE}" if adapter.subfolder else ADAPTER_FILE
    targets = tuple(
        Target(tensor.name, TensorSpec(tensor.name, SAFETENSORS_DTYPE[tensor.shard.dtype], tensor.shard.shape),
               tensor.shard)
        for tensor in adapter.tensors
    )  # fmt: skip
    file = plan_file(path, (target.spec for target in targets))
    claims, parts = _claims(0, file, {target.name: target.shard for target in targets}, rank)
    layout = Layout((ImageFile(path, file.header, file.total_bytes),), adapter.documents)
    return Plan(layout, {path: targets}, claims, parts)


def _claims(
    file_index: int, file: FileLayout, shards: Mapping[str, Shard], rank: int
) -> tuple[list[Claim], list[Part]]:
    claims, parts = [], []
    for tensor_index, extent in enumerate(file.extents):
        shard = shards[extent.spec.name]
        if shard.region.numel == 0 or (shard.is_buffer and rank != 0):
            continue
        claims.append(Claim(file_index, tensor_index, shard.region))
        parts.append(Part(file.path, extent, shard))
    return claims, parts


def save_record(step: int, metrics: Mapping[str, Any] | None, extra: Any) -> SaveRecord:
    """What the manifest will say of a save. Raises CheckpointError for what JSON cannot hold; nothing is pickled."""
    checkpoint_name(step)
    plain = {}
    for name, value in (metrics or {}).items():
        # Tensors and numpy scalars of one element are what loops have at hand.
        scalar = value.item() if hasattr(value, "item") and getattr(value, "size", None) is not None else value
        if not isinstance(name, str) or not isinstance(scalar, bool | int | float | str | None):
            raise CheckpointError(
                f"metrics[{name!r}] is a {type(value).__name__}: give numbers or strings, as in {{'loss': loss.item()}}"
            )
        plain[name] = scalar
    try:
        # Through JSON and back: what the caller changes afterwards is not ours.
        copied = msgspec.json.decode(msgspec.json.encode(extra))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"extra cannot be written as JSON: {error}; give dicts, lists, numbers, strings"
        ) from error
    return SaveRecord(step, plain, copied, {})
