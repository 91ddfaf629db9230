"""What a checkpoint of this model consists of, and which of it lies on this rank. Made once, at attach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import xxhash

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.manifest import checkpoint_name
from async_ckpt.core.protocol import Claim, ImageFile, Layout, SaveRecord

from .adapter import SAFETENSORS_DTYPE, plan_adapter
from .restore import Target
from .sharding import Shard, find_shards
from .staging import Part
from .training_state import TENSORS_FILE, Parts, TrainingState

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Plan:
    """`adapter` are the targets of the adapter's file, at `adapter_path`; `state` is the training state, if any is
    saved. `claims` and `parts` run in parallel: what this rank holds, as the saver is told and as it is copied if the
    saver grants it."""

    layout: Layout
    adapter_path: str
    adapter: tuple[Target, ...]
    state: TrainingState | None
    claims: list[Claim]
    parts: list[Part]

    @property
    def layout_hash(self) -> str:
        digest = xxhash.xxh3_128()
        for file in self.layout.files:
            digest.update(file.path.encode() + b"\0" + file.header)
        return digest.hexdigest()


def plan_checkpoint(model: torch.nn.Module, adapter_name: str, state_parts: Parts, *, rank: int, world: int) -> Plan:
    """Runs no collective. Raises CheckpointError if the model has nothing that could be saved under that name, or if
    some of the training state cannot be saved."""
    shards = find_shards(model)
    adapter = plan_adapter(model, adapter_name, documents=rank == 0)
    path = f"{adapter.subfolder}/{ADAPTER_FILE}" if adapter.subfolder else ADAPTER_FILE
    targets = tuple(make_target(tensor.name, tensor.shard) for tensor in adapter.tensors)
    held = [(target.name, target.shard, _writes(target.shard, rank)) for target in targets]
    builder = _Builder()
    builder.add(path, held)
    state = None
    if state_parts:
        state = TrainingState(state_parts, shards, rank=rank, world=world)
        builder.add(TENSORS_FILE, [
            *((tensor.name, tensor, tensor.writes) for tensor in state.tensors),
            *((generator.name, generator, generator.region.numel > 0) for generator in state.rng),
        ])  # fmt: skip
    layout = Layout(tuple(builder.files), adapter.documents)
    return Plan(layout, path, targets, state, builder.claims, builder.parts)


def make_target(name: str, shard: Shard) -> Target:
    return Target(name, TensorSpec(name, SAFETENSORS_DTYPE[shard.dtype], shard.shape), shard)


def _writes(shard: Shard, rank: int) -> bool:
    """Buffers lie on every rank and may differ: rank 0's are the ones that PEFT would write."""
    return shard.region.numel > 0 and (rank == 0 or not shard.is_buffer)


class _Builder:
    """Collects files, and for each tensor that this rank may write a claim and the part that would be copied."""

    def __init__(self) -> None:
        self.files: list[ImageFile] = []
        self.claims: list[Claim] = []
        self.parts: list[Part] = []

    def add(self, path: str, tensors: Sequence[tuple[str, Shard, bool]]) -> None:
        layout = plan_file(path, (make_target(name, shard).spec for name, shard, _ in tensors))
        by_name = {name: (shard, writes) for name, shard, writes in tensors}
        for index, extent in enumerate(layout.extents):
            shard, writes = by_name[extent.spec.name]
            if writes:
                self.claims.append(Claim(len(self.files), index, shard.region))
                self.parts.append(Part(path, extent, shard))
        self.files.append(ImageFile(path, layout.header, layout.total_bytes))


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
