"""A slot as this rank sees it: the image mapped, its own pages at hand, a view for every part that it owns."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from async_ckpt.core.layout import Extent
from async_ckpt.core.region import Region
from async_ckpt.core.slots import SlotPaths, StateFile

from .pages import Span, page_runs, span_of
from .pinning import MAX_RUNS, Pinned
from .sharding import Shard

log = logging.getLogger(__name__)

# Linux 5.14; the mmap module has no names for them before Python 3.14.
POPULATE_READ = 22
POPULATE_WRITE = 23


@dataclass(frozen=True)
class Part:
    """One owned piece: `shard`'s local tensor goes to `extent` of image file `path`."""

    path: str
    extent: Extent
    shard: Shard

    @property
    def title(self) -> str:
        region = self.shard.region
        whole = region.numel == self.extent.spec.numel
        return f"tensor {self.extent.spec.name!r}" + ("" if whole else f" at {region.offsets}+{region.sizes}")


def image_view(image: torch.Tensor, extent: Extent, dtype: torch.dtype, region: Region) -> torch.Tensor:
    """The part `region` of a tensor inside a file's bytes `image` (uint8), with shape `region.sizes`. No copy."""
    whole = image[extent.start : extent.stop].view(dtype)
    if region.flat:
        return whole[region.offsets[0] : region.offsets[0] + region.sizes[0]]
    whole = whole.view(extent.spec.shape)
    for dim, (offset, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole


class Mapping(NamedTuple):
    """A mapped file, its `bytes`, the parts of it whose pages are at hand (by tensor and `id` of the shard), and which
    of its pages are page-locked."""

    mapped: mmap.mmap
    bytes: torch.Tensor
    at_hand: dict[tuple[str, int], torch.Tensor]
    pinned: Pinned

    def fetch(self, views: Sequence[torch.Tensor]) -> None:
        """Map the pages of `views`, which are not at hand."""
        base = self.bytes.data_ptr()
        populate(self.mapped, page_runs([span_of(view, base) for view in views]), POPULATE_READ)


class Slot:
    """One slot, mapped into this process. `targets` lie in the order of the parts."""

    def __init__(self, run: Path, index: int, parts: Sequence[Part]) -> None:
        self.index = index
        self.paths = SlotPaths(run, index)
        self.state = StateFile(self.paths.state)
        self._maps: dict[str, mmap.mmap] = {}
        self._images: dict[str, torch.Tensor] = {}
        self._pinned = Pinned()
        self._parts = parts
        for path in {part.path for part in parts}:
            with (self.paths.image / path).open("r+b") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0)
            self._images[path] = torch.frombuffer(self._maps[path], dtype=torch.uint8)
        self.targets = [
            image_view(self._images[part.path], part.extent, part.shard.dtype, part.shard.region) for part in parts
        ]
        self._own: dict[str, list[Span]] = {path: [] for path in self._maps}
        for part, target in zip(parts, self.targets, strict=True):
            self._own[part.path].append(span_of(target, self._images[part.path].data_ptr()))
        for path, mapped in self._maps.items():
            populate(mapped, page_runs(self._own[path]), POPULATE_WRITE)

    def mapping(self, path: str) -> Mapping | None:
        """The image's file `path` if it is mapped here."""
        if path not in self._images:
            return None
        ours = zip(self._parts, self.targets, strict=True)
        at_hand = {(part.extent.spec.name, id(part.shard)): target for part, target in ours if part.path == path}
        return Mapping(self._maps[path], self._images[path], at_hand, self._pinned)

    def pin(self) -> None:
        """Page-lock what this rank owns of the image. Not the rest: other ranks lock theirs, and where a host has only
        a part of the image, memory would be taken for all of it."""
        for path, image in self._images.items():
            self._pinned.register(image.data_ptr(), page_runs(self._own[path], MAX_RUNS), path)

    def is_pinned(self, view: torch.Tensor) -> bool:
        """Whether the GPU copies into `view` by itself."""
        return self._pinned.holds(view)

    def close(self) -> None:
        self._pinned.close()
        # The views keep the mapping alive until the last of them is gone; the kernel frees it then.
        self.targets.clear()
        self._images.clear()
        self._maps.clear()
        self.state.close()


def populate(mapped: mmap.mmap, runs: Sequence[Span], advice: int) -> None:
    """Map the pages of `runs`, all at once: a copy would otherwise take a page fault for each of them."""
    for start, stop in runs:
        try:
            mapped.madvise(advice, start, stop - start)
        except OSError as error:
            log.debug("the first copy will be slower, pages cannot be mapped ahead: %s", error)
            return
