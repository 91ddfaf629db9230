"""Who copies what several ranks hold. Pure."""

from __future__ import annotations

import bisect
import heapq
import operator
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from async_ckpt.core.claims import Line
from async_ckpt.core.layout import DTYPE_BITS

from .boxes import Holders


class Pattern(msgspec.Struct, frozen=True):
    """Runs on the line of elements, ascending, that each of `ranks` holds."""

    ranks: list[int]
    starts: memoryview[int]
    lengths: memoryview[int]

    def ends(self, low: int, high: int) -> list[int]:
        return list(map(operator.add, self.starts[low:high], self.lengths[low:high]))

    def between(self, begin: int, end: int) -> tuple[int, int]:
        """The numbers [low, high) of the runs that start in [begin, end)."""
        low = bisect.bisect_left(self.starts, begin)
        return low, bisect.bisect_left(self.starts, end, low)


class Shared(msgspec.Struct, frozen=True):
    """A run that several patterns have: each with the number that it has there."""

    start: int
    length: int
    holders: list[tuple[int, int]]


class _Loads:
    """The bytes that each rank copies so far; the least loaded rank of a pattern is found without asking them all."""

    def __init__(self, patterns: Sequence[Pattern], load_bytes: dict[int, int]) -> None:
        self.bytes = load_bytes
        self._heaps = [[(load_bytes[rank], rank) for rank in pattern.ranks] for pattern in patterns]
        for heap in self._heaps:
            heapq.heapify(heap)

    def least(self, pattern: int) -> tuple[int, int]:
        """Load and rank. Loads only grow, so what a heap says may be too little, never too much."""
        heap = self._heaps[pattern]
        while heap[0][0] != self.bytes[heap[0][1]]:
            heapq.heapreplace(heap, (self.bytes[heap[0][1]], heap[0][1]))
        return heap[0]


def share_out(
    line: Line, patterns: Sequence[Pattern], shared: Sequence[Shared], boxes: Mapping[int, Holders]
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """For each rank the numbers of the claims that it owns, and of those that others hold as well."""
    several: list[set[int]] = [set() for _ in patterns]
    for run in shared:
        for which, index in run.holders:
            several[which].add(index)
    ranges: dict[int, list[int]] = {}  # one list for all ranks that own all of their runs
    owned: dict[int, list[int]] = {}
    replicated: dict[int, list[int]] = {}
    for pattern, indices in zip(patterns, several, strict=True):
        every = ranges.setdefault(len(pattern.starts), list(range(len(pattern.starts))))
        alone = len(pattern.ranks) == 1
        for rank in pattern.ranks:
            owned[rank] = [] if not alone else every if not indices else [i for i in every if i not in indices]
            replicated[rank] = every if not alone else sorted(indices)
    work = [*_replicated_runs(line, patterns, shared, several), *_replicated_boxes(line, boxes)]
    single = [box for holders in boxes.values() for box in holders.items() if len(box[1]) == 1]
    if not work and not single:
        return owned, replicated
    owned, replicated = ({rank: list(numbers) for rank, numbers in each.items()} for each in (owned, replicated))
    load_bytes = {rank: _load_bytes(line, pattern, mine, len(pattern.ranks) > 1)
                  for pattern, mine in zip(patterns, several, strict=True) for rank in pattern.ranks}  # fmt: skip
    for number, holders in boxes.items():
        for region, who in holders.items():
            if len(who) == 1:
                owned[who[0][0]].append(who[0][1])
                load_bytes[who[0][0]] += region.numel * _width_bits(line, number) // 8
            else:
                for rank, index in who:
                    replicated[rank].append(index)
    loads = _Loads(patterns, load_bytes)
    for nbytes, _, shared_run, box in sorted(work, key=lambda each: each[:2], reverse=True):
        if shared_run is not None:
            (_, rank), index = min((loads.least(which), index) for which, index in shared_run.holders)
        else:
            rank, index = min(box, key=lambda holder: (load_bytes[holder[0]], holder[0]))
        owned[rank].append(index)
        load_bytes[rank] += nbytes
    return {rank: sorted(numbers) for rank, numbers in sorted(owned.items())}, replicated


_Work = tuple[int, int, Shared | None, Sequence[tuple[int, int]]]  # bytes, minus the place, and who holds it


def _replicated_runs(
    line: Line, patterns: Sequence[Pattern], shared: Sequence[Shared], several: Sequence[set[int]]
) -> Iterator[_Work]:
    for run in shared:
        yield run.length * _width_bits_at(line, run.start) // 8, -run.start, run, ()
    for which, pattern in enumerate(patterns):
        if len(pattern.ranks) > 1:
            for index, (start, length) in enumerate(zip(pattern.starts, pattern.lengths, strict=True)):
                if index not in several[which]:
                    own = Shared(start, length, [(which, index)])
                    yield length * _width_bits_at(line, start) // 8, -start, own, ()


def _replicated_boxes(line: Line, boxes: Mapping[int, Holders]) -> Iterator[_Work]:
    for number, holders in boxes.items():
        for region, who in holders.items():
            if len(who) > 1:
                yield region.numel * _width_bits(line, number) // 8, -line.starts[number], None, who


def _load_bytes(line: Line, pattern: Pattern, several: set[int], replicated: bool) -> int:
    """Of the runs that nobody else has."""
    if replicated:
        return 0
    bits, low = 0, 0
    for end, width in _widths(line):
        high = bisect.bisect_left(pattern.starts, end, low)
        bits += sum(pattern.lengths[low:high]) * width
        low = high
    bits -= sum(pattern.lengths[index] * _width_bits_at(line, pattern.starts[index]) for index in several)
    return bits // 8


def _widths(line: Line) -> Iterator[tuple[int, int]]:
    """Stretches of the line whose elements have one width: where each ends, and the bits of an element. Files are in
    the order of their tensors' types, so there are few."""
    width = 0
    for number, extent in enumerate(line.extents):
        if width and DTYPE_BITS[extent.spec.dtype] != width:
            yield line.starts[number], width
        width = DTYPE_BITS[extent.spec.dtype]
    yield line.starts[-1], width


def _width_bits(line: Line, number: int) -> int:
    return DTYPE_BITS[line.extents[number].spec.dtype]


def _width_bits_at(line: Line, place: int) -> int:
    return _width_bits(line, bisect.bisect_right(line.starts, place) - 1)
