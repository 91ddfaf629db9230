"""A slot as this rank sees it: the image mapped, its own pages at hand, a view for every part that it owns."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from async_ckpt.core.layout import Extent
from async_ckpt.core.region import Region
from async_ckpt.core.slots import SlotPaths, StateFile

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
    """A mapped file, its `bytes`, and where views of it lie (address, bytes) whose pages are at hand."""

    mapped: mmap.mmap
    bytes: torch.Tensor
    at_hand: set[tuple[int, int]]

    def fetch(self, views: Sequence[torch.Tensor]) -> None:
        """Map the pages of `views` that are not at hand."""
        missing = [view for view in views if _place(view) not in self.at_hand]
        populate(self.mapped, self.bytes.data_ptr(), missing, POPULATE_READ)


class Slot:
    """One slot, mapped into this process. `targets` lie in the order of the parts."""

    def __init__(self, run: Path, index: int, parts: Sequence[Part]) -> None:
        self.index = index
        self.paths = SlotPaths(run, index)
        self.state = StateFile(self.paths.state)
        self._maps: dict[str, mmap.mmap] = {}
        self._images: dict[str, torch.Tensor] = {}
        self._pinned: list[int] = []
        for path in {part.path for part in parts}:
            with (self.paths.image / path).open("r+b") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0)
            self._images[path] = torch.frombuffer(self._maps[path], dtype=torch.uint8)
        self.targets = [
            image_view(self._images[part.path], part.extent, part.shard.dtype, part.shard.region) for part in parts
        ]
        for path, mapped in self._maps.items():
            own = [target for part, target in zip(parts, self.targets, strict=True) if part.path == path]
            populate(mapped, self._images[path].data_ptr(), own, POPULATE_WRITE)

    def mapping(self, path: str) -> Mapping | None:
        """The image's file `path` if it is mapped here."""
        if path not in self._images:
            return None
        return Mapping(self._maps[path], self._images[path], {_place(target) for target in self.targets})

    def pin(self) -> None:
        """Page-lock the image, so that the GPU copies into it without a bounce buffer and without stopping."""
        for path, image in self._images.items():
            result = _cudart().cudaHostRegister(image.data_ptr(), image.numel(), 0)
            if int(result) != 0:
                _forget_cuda_error()
                log.warning("cannot pin %s (CUDA error %s): saves will be slower", path, int(result))
            else:
                self._pinned.append(image.data_ptr())

    def close(self) -> None:
        for pointer in self._pinned:
            _cudart().cudaHostUnregister(pointer)
        self._pinned.clear()
        # The views keep the mapping alive until the last of them is gone; the kernel frees it then.
        self.targets.clear()
        self._images.clear()
        self._maps.clear()
        self.state.close()


def populate(mapped: mmap.mmap, base: int, views: Sequence[torch.Tensor], advice: int) -> None:
    """Map the pages of `views`, which lie in `mapped` at address `base`, all at once: a copy would otherwise take a
    page fault for each of them."""
    page = mmap.PAGESIZE
    start = stop = 0
    for begin, end in [*sorted(_span(view, base) for view in views if view.numel()), (len(mapped) + 2 * page, 0)]:
        if begin > stop + page:
            first = start // page * page
            try:
                mapped.madvise(advice, first, stop - first)
            except OSError as error:
                log.debug("the first copy will be slower, pages cannot be mapped ahead: %s", error)
                return
            start = begin
        stop = max(stop, end)


def _place(view: torch.Tensor) -> tuple[int, int]:
    return view.data_ptr(), view.nbytes


def _span(view: torch.Tensor, base: int) -> tuple[int, int]:
    """The bytes [start, stop) from address `base` within which `view` lies: a rank's own part of a large tensor."""
    start = view.data_ptr() - base
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return start, start + (last + 1) * view.element_size()


def _forget_cuda_error() -> None:
    """CUDA keeps the last error, and torch would raise it after its next kernel, far from here."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libcudart" in line:
            ctypes.CDLL(line.split(maxsplit=5)[5]).cudaGetLastError()
            return


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
