"""From a checkpoint directory, in RAM or on disk, into local shards: each rank reads only the bytes that it holds."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import FileLayout, TensorSpec, header_bytes, parse_file

from .sharding import Shard
from .staging import image_view

_SHOWN = 8  # differences listed before "and N more"


@dataclass(frozen=True)
class Restored:
    """What `restore` put into the model. `path` is the committed checkpoint, also when the bytes came from RAM."""

    step: int
    metrics: dict[str, Any]
    extra: Any
    source: Literal["ram", "disk"]
    path: Path


@dataclass(frozen=True)
class Target:
    """`shard` takes its part of the tensor `name` of the file."""

    name: str
    spec: TensorSpec
    shard: Shard


def read_into(path: Path, targets: Sequence[Target]) -> None:
    """Copy every target's region from the safetensors file at `path` into its shard.

    Guarantee: nothing is written to the model unless names, shapes and dtypes all match and the file is whole.
    Raises CheckpointError listing what differs, or if the file is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    layout = _parse(path, mapped)
    _check_match(path, layout, targets)
    image = torch.frombuffer(mapped, dtype=torch.uint8)
    extents = {extent.spec.name: extent for extent in layout.extents}
    sources, destinations = [], []
    for target in targets:
        shard = target.shard
        if shard.region.numel:
            sources.append(image_view(image, extents[target.name], shard.dtype, shard.region))
            destinations.append(shard.local())
    if destinations:
        with torch.no_grad():
            torch._foreach_copy_(destinations, sources)


def _parse(path: Path, mapped: mmap.mmap) -> FileLayout:
    try:
        length = header_bytes(mapped[:8])
    except ValueError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    layout = parse_file(str(path), mapped[:length])
    if layout.total_bytes != len(mapped):
        raise CheckpointError(f"{path} has {len(mapped)} bytes, but its header describes {layout.total_bytes}")
    return layout


def _check_match(path: Path, layout: FileLayout, targets: Sequence[Target]) -> None:
    in_file = {extent.spec.name: extent.spec for extent in layout.extents}
    wanted = {target.name: target.spec for target in targets}
    differences = [f"{name}: not in the file" for name in wanted if name not in in_file]
    differences += [f"{name}: in the file, but not in the model" for name in in_file if name not in wanted]
    for name, spec in wanted.items():
        found = in_file.get(name, spec)
        if found != spec:
            differences.append(f"{name}: {found.dtype} {list(found.shape)} in the file, "
                               f"{spec.dtype} {list(spec.shape)} in the model")  # fmt: skip
    if differences:
        more = f"\n  and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        listed = "".join(f"\n  {line}" for line in differences[:_SHOWN])
        raise CheckpointError(f"{path} does not fit this model; build it with the same PEFT config:{listed}{more}")
