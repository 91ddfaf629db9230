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
from async_ckpt.core.location import Location, Url
from async_ckpt.core.region import Region

from .fetched import Fetched, batches, runs_of
from .mapped import Mapping, image_view
from .pinning import Pinned
from .sharding import Shard

_SHOWN = 8  # differences listed before "and N more"


@dataclass(frozen=True)
class Restored:
    """What `restore` put into the model. `path` is the committed checkpoint, also when the bytes came from RAM."""

    step: int
    metrics: dict[str, Any]
    extra: Any
    source: Literal["ram", "disk"]
    path: Location


@dataclass(frozen=True)
class Target:
    """`shard` takes its part of the tensor `name` of the file."""

    name: str
    spec: TensorSpec
    shard: Shard


class OpenFile:
    """A safetensors file, mapped: only the pages that are read are fetched. One in an object store is fetched piece by
    piece into a mapping that is as large as it and holds what is wanted just now. `mapping`: of a file that is mapped
    already; to map and unmap it again would take longer than the copy. `planned`: layouts that it may have, which then
    need not be read from it.

    Raises CheckpointError if it is missing or its length is not what its header says.
    """

    def __init__(self, path: Location, mapping: Mapping | None = None, planned: Sequence[FileLayout] = ()) -> None:
        self.fetched: Fetched | None = None
        try:
            if mapping is not None:
                mapped = mapping.mapped
            elif isinstance(path, Url):
                self.fetched = Fetched(path)
                mapped = self.fetched.mapped
            else:
                mapped = _map(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        self.path = path
        layout = next((each for each in planned if _is_laid_out(mapped, each)), None) or _parse(path, mapped)
        self.extents = {extent.spec.name: extent for extent in layout.extents}
        self._mapping = mapping or _unpinned(mapped)
        self._image = self._mapping.bytes

    def differences(self, targets: Sequence[Target], *, ignore: str | None = None) -> list[str]:
        """How names, shapes and dtypes differ from `targets`; names that begin with `ignore` do not count."""
        wanted = {target.name: target.spec for target in targets}
        found = {
            name: extent.spec for name, extent in self.extents.items() if ignore is None or not name.startswith(ignore)
        }
        lines = [f"{name}: not in the file" for name in wanted if name not in found]
        lines += [f"{name}: in the file, but not in the model" for name in found if name not in wanted]
        for name, spec in wanted.items():
            other = found.get(name, spec)
            if other != spec:
                lines.append(f"{name}: {other.dtype} {list(other.shape)} in the file, "
                             f"{spec.dtype} {list(spec.shape)} in the model")  # fmt: skip
        return lines

    def read_into(self, targets: Sequence[Target]) -> None:
        """Copy every target's region into its shard: `differences` must have been empty."""
        wanted = [target for target in targets if target.shard.region.numel]
        if not wanted:
            return
        destinations = [target.shard.local() for target in wanted]
        at_hand = self._mapping.at_hand
        known = [at_hand.get((target.name, id(target.shard))) for target in wanted]
        sources = [self._view(self._image, target) if view is None else view
                   for target, view in zip(wanted, known, strict=True)]  # fmt: skip
        if self.fetched is None:
            others = [index for index, view in enumerate(known) if view is None]
            split = {index for index in others if self._mapping.pinned.splits(sources[index])}
            self._mapping.fetch([sources[index] for index in others if index not in split])
            if split:
                again = self._map_again()
                for index in split:
                    sources[index] = self._view(again.bytes, wanted[index])
                again.fetch([sources[index] for index in split])
            with torch.no_grad():
                torch._foreach_copy_(destinations, sources)
            return
        base = self._image.data_ptr()
        spans = [runs_of(source, base) for source in sources]
        for batch in batches(spans):
            with self.fetched.holding([run for index in batch for run in spans[index]]), torch.no_grad():
                torch._foreach_copy_([destinations[index] for index in batch], [sources[index] for index in batch])

    def _view(self, image: torch.Tensor, target: Target) -> torch.Tensor:
        return image_view(image, self.extents[target.name], target.shard.dtype, target.shard.region)

    def _map_again(self) -> Mapping:
        """The same file elsewhere, where none of its pages is locked: CUDA copies no memory of which a part is."""
        try:
            assert isinstance(self.path, Path)
            return _unpinned(_map(self.path))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {self.path}: {error}") from error

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A whole tensor, copied."""
        extent = self.extents[name]
        if self.fetched is not None:
            with self.fetched.holding([(extent.start, extent.stop)]):
                return image_view(self._image, extent, dtype, Region.whole(extent.spec.shape)).clone()
        return image_view(self._image, extent, dtype, Region.whole(extent.spec.shape)).clone()


def mismatch(path: Location, differences: Sequence[str]) -> CheckpointError:
    """One error that lists them all, or as many as one can read."""
    more = f"\n  and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    listed = "".join(f"\n  {line}" for line in differences[:_SHOWN])
    return CheckpointError(f"{path} does not fit what is attached; build it as it was when it was saved:{listed}{more}")


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _unpinned(mapped: mmap.mmap) -> Mapping:
    return Mapping(mapped, torch.frombuffer(mapped, dtype=torch.uint8), {}, Pinned())


def _is_laid_out(mapped: mmap.mmap, layout: FileLayout) -> bool:
    return len(mapped) == layout.total_bytes and mapped[: len(layout.header)] == layout.header


def _parse(path: Location, mapped: mmap.mmap) -> FileLayout:
    try:
        length = header_bytes(mapped[:8])
    except ValueError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    layout = parse_file(str(path), mapped[:length])
    if layout.total_bytes != len(mapped):
        raise CheckpointError(f"{path} has {len(mapped)} bytes, but its header describes {layout.total_bytes}: it "
                              f"is damaged; restore an older one and move this one away")  # fmt: skip
    return layout
