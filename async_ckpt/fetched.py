"""A file in an object store, fetched in the ranges that are wanted: a rank reads what its sharding needs, no more."""

from __future__ import annotations

import contextlib
import itertools
import mmap
from collections.abc import Iterator, Sequence

import torch

from async_ckpt.core.layout import header_bytes
from async_ckpt.core.location import Url
from async_ckpt.core.objects import GAP_BYTES, Objects

_FIRST_BYTES = 64 << 10  # most headers are shorter: then it takes one request
_BATCH_BYTES = 256 << 20
_MAP_NORESERVE = 0x4000


class Fetched:
    """`mapped` is as long as the file and takes memory only for its header and what `holding` has fetched.

    Raises FileNotFoundError if there is no such object, ValueError if it is no safetensors file.
    """

    def __init__(self, url: Url) -> None:
        self._objects, self._key = Objects(url), url.key
        about = self._objects.stat(url.key)
        if about is None:
            raise FileNotFoundError(f"there is no object {url}")
        if about.bytes == 0:
            raise ValueError("it is empty")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self.mapped = mmap.mmap(-1, about.bytes, flags=flags)
        self.fetched_bytes = 0
        self._fetch([(0, min(_FIRST_BYTES, about.bytes))])
        self.header_bytes = min(header_bytes(self.mapped[:8]), about.bytes)
        self._fetch([(_FIRST_BYTES, self.header_bytes)])

    @contextlib.contextmanager
    def holding(self, ranges: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Within the block these bytes are in `mapped`; afterwards their memory is given back."""
        self._fetch(ranges)
        yield
        page = mmap.PAGESIZE
        kept = -(-self.header_bytes // page) * page
        for start, stop in ranges:
            first, last = max(kept, start // page * page), min(len(self.mapped), -(-stop // page) * page)
            if first < last:
                self.mapped.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        for start, data in self._objects.read_ranges(self._key, [each for each in ranges if each[0] < each[1]]):
            self.mapped[start : start + len(data)] = data
            self.fetched_bytes += len(data)


def batches(spans: Sequence[Sequence[tuple[int, int]]]) -> Iterator[list[int]]:
    """Indices of `spans`, in the file's order, so many at a time that no batch has much more than 256 MiB."""
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(spans)), key=lambda each: spans[each][0]):
        batch.append(index)
        total += sum(stop - start for start, stop in spans[index])
        if total >= _BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def runs_of(view: torch.Tensor, base: int) -> list[tuple[int, int]]:
    """The bytes [start, stop) from address `base` that `view` reads, one range for each run; gaps that cost
    less than another request count as read."""
    start, width = view.data_ptr() - base, view.element_size()
    length, dimension = width, view.dim()
    # The last dimensions, as long as they lie without a gap that is worth a request.
    while dimension and view.stride(dimension - 1) * width - length <= GAP_BYTES:
        dimension -= 1
        length += (view.shape[dimension] - 1) * view.stride(dimension) * width
    steps = [range(view.shape[each]) for each in range(dimension)]
    offsets = (sum(index * view.stride(each) for each, index in enumerate(indices)) * width
               for indices in itertools.product(*steps))  # fmt: skip
    return [(start + offset, start + offset + length) for offset in offsets]
