"""What a checkpoint of this model consists of, and which of it lies on this rank. Made once, at attach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import xxhash

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import FileLayout, TensorSpec, plan_file
from async_ckpt.core.limits import check_depth
from async_ckpt.core.manifest import checkpoint_name
from async_ckpt.core.protocol import Claim, Claims, ImageFile, Layout, SaveRecord

from .adapter import holds_adapters, plan_adapter
from .contents import SAFETENSORS_DTYPE, Contents, joined
from .files import own_files
from .full_model import plan_full_model
from .mapped import Part
from .plain_model import Weights, plan_plain_model
from .restore import Target
from .sharding import Shard, find_shards
from .training_state import TENSORS_FILE, Parts, TrainingState

DEFAULT_ADAPTER = "default"  # PEFT's own name for the first adapter


@dataclass(frozen=True)
class Plan:
    """`layouts` say where in the files of `layout` each tensor lies. `weights` are the targets of each file with
    weights, by its path; `state` is the training state, if any is saved. `claims` are what this rank holds, as the
    saver is told; `parts`, in the same order, how it is copied if the saver grants it."""

    layout: Layout
    layouts: Sequence[FileLayout]
    weights: Mapping[str, tuple[Target, ...]]
    state: TrainingState | None
    claims: Claims
    parts: list[Part]
    version: Callable[[], object]
    made_for: object
    base_models: Mapping[str, str]

    @property
    def outdated(self) -> bool:
        """Whether other tensors would have to be written by now: AdaLoRA has given up some ranks."""
        return self.version() != self.made_for

    @property
    def paths(self) -> list[str]:
        """The files of each checkpoint, but for the small ones of one save."""
        return [*(file.path for file in self.layout.files), *self.layout.documents]

    @property
    def layout_hash(self) -> str:
        digest = xxhash.xxh3_128()
        for file in self.layout.files:
            digest.update(file.path.encode() + b"\0" + file.header)
        return digest.hexdigest()


@dataclass(frozen=True)
class Selection:
    """Which weights of a model are saved. `weights` "auto": the adapters of these names, or, where there are none, all,
    split as `max_shard_size` says; else parameters by their own names."""

    adapter_names: tuple[str, ...]
    max_shard_size: int | str
    weights: Weights = "auto"


def plan_checkpoint(
    model: torch.nn.Module,
    selection: Selection,
    state_parts: Parts,
    files: Mapping[str, bytes] | None = None,
    *,
    rank: int,
    world: int,
) -> Plan:
    """`files` are the caller's own, the same in every save. Runs no collective. Raises CheckpointError if the model has
    nothing that could be saved as selected, or if some of the training state or of `files` cannot be saved."""
    shards = find_shards(model)
    contents = _plan_weights(model, selection, shards, documents=rank == 0)
    builder = _Builder()
    weights = {}
    for path, tensors in contents.files.items():
        weights[path] = tuple(make_target(tensor.name, tensor.shard) for tensor in tensors)
        builder.add(path, [(tensor.name, tensor.shard, _writes(tensor.shard, rank)) for tensor in tensors])
    state = None
    if state_parts:
        state = TrainingState(state_parts, shards, rank=rank, world=world)
        builder.add(TENSORS_FILE, [
            *((tensor.name, tensor, tensor.writes) for tensor in state.tensors),
            *((generator.name, generator, generator.region.numel > 0) for generator in state.rng),
        ])  # fmt: skip
    own = own_files(files, [*weights, *contents.documents])
    layout = Layout(tuple(builder.files), contents.documents | (own if rank == 0 else {}))
    claims, order = pack_claims(builder.layouts, builder.claims)
    parts = [builder.parts[index] for index in order]
    return Plan(layout, builder.layouts, weights, state, claims, parts, contents.version, contents.version(),
                contents.base_models)  # fmt: skip


def _plan_weights(
    model: torch.nn.Module, selection: Selection, shards: Mapping[str, Shard], *, documents: bool
) -> Contents:
    if selection.weights != "auto":
        return plan_plain_model(model, selection.weights)
    if holds_adapters(model) or selection.adapter_names != (DEFAULT_ADAPTER,):
        names = selection.adapter_names
        return joined([plan_adapter(model, name, documents=documents, shards=shards).contents for name in names])
    return plan_full_model(model, max_shard_size=selection.max_shard_size, documents=documents)


def make_target(name: str, shard: Shard) -> Target:
    return Target(name, TensorSpec(name, SAFETENSORS_DTYPE[shard.dtype], shard.shape), shard)


def _writes(shard: Shard, rank: int) -> bool:
    """Buffers lie on every rank and may differ: rank 0's are the ones that PEFT would write."""
    return shard.region.numel > 0 and (rank == 0 or not shard.is_buffer)


class _Builder:
    """Collects files, and for each tensor that this rank may write a claim and the part that would be copied."""

    def __init__(self) -> None:
        self.layouts: list[FileLayout] = []
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
        self.layouts.append(layout)
        self.files.append(ImageFile(path, layout.header, layout.total_bytes))


def save_record(
    step: int, metrics: Mapping[str, Any] | None, extra: Any, files: Mapping[str, bytes] | None = None
) -> SaveRecord:
    """What the manifest will say of a save, and the caller's `files` in it, checked already. Raises CheckpointError for
    what JSON cannot hold; nothing is pickled."""
    checkpoint_name(step)
    plain = {}
    if metrics is not None and not isinstance(metrics, Mapping):
        raise CheckpointError(f"metrics is a {type(metrics).__name__}: give a dict, as in {{'loss': loss.item()}}")
    for name, value in (metrics or {}).items():
        scalar = _scalar(value)
        if not isinstance(name, str):
            raise CheckpointError(f"metrics has the key {name!r}: keys must be strings")
        if not isinstance(scalar, bool | int | float | str | None):
            raise CheckpointError(
                f"metrics[{name!r}] is a {type(value).__name__}: give numbers or strings, as in {{'loss': loss.item()}}"
            )
        plain[name] = scalar
    try:
        msgspec.msgpack.encode(plain)
    except (OverflowError, ValueError) as error:
        raise CheckpointError(f"metrics cannot be stored: {error}; give 64-bit numbers and valid text") from error
    copied = None
    if extra is not None:
        try:
            # Through JSON and back: what the caller changes afterwards is not ours.
            copied = msgspec.json.decode(msgspec.json.encode(extra))
            check_depth(copied, "extra")
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"extra cannot be written as JSON: {error}; give dicts, lists, numbers, strings"
            ) from error
    record = SaveRecord(step, plain, copied, dict(files or {}))
    try:
        msgspec.msgpack.encode(copied)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"extra holds what cannot be stored: {error}; numbers have at most 64 bits") from error
    return record


def _scalar(value: Any) -> Any:
    """Tensors and numpy scalars of one element are what loops have at hand; anything else comes back as it is."""
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        try:
            return value.item()
        except (RuntimeError, ValueError):  # more than one element
            return value
    return value
