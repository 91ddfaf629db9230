"""Which bytes of an image a rank owns, and how they are cut into pieces. Pure.

Both ends of a link cut alike, so a piece is named by its number, and nobody can be told to write anywhere else.
"""

from __future__ import annotations

import bisect
import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from async_ckpt.core.claims import Line
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import DTYPE_BITS, Extent, FileLayout
from async_ckpt.core.protocol import Claims
from async_ckpt.core.region import Region

PIECE_BYTES = 4 << 20
EDGE_PIECE_BYTES = 1 << 20
_INT_BYTES = 8


class Span(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Bytes [start, stop) of image file number `file`."""

    file: int
    start: int
    stop: int


def spans_of(files: Sequence[FileLayout], claims: Claims, owned: Iterable[int]) -> list[Span]:
    """The bytes of those of `claims` that `owned` numbers: ascending, merged where they touch.

    `claims` must have been found to fit the files (`coverage.assign_owners`).
    """
    line = Line.of(files)
    file_of = [number for number, file in enumerate(files) for _ in file.extents]
    starts, lengths = memoryview(claims.starts).cast("q"), memoryview(claims.lengths).cast("q")
    found: list[Span] = []
    for index in owned:
        if index < len(starts):
            tensor = bisect.bisect_right(line.starts, starts[index]) - 1
            extent = line.extents[tensor]
            first = starts[index] - line.starts[tensor]
            found.append(_bytes(file_of[tensor], extent, first, lengths[index]))
        else:
            claim = claims.boxes[index - len(starts)]
            number = line.first[claim.file] + claim.tensor
            found += _box(claim.file, line.extents[number], claim.region)
    return merged(found)


def merged(spans: Iterable[Span]) -> list[Span]:
    """Ascending, without gaps of nothing between them."""
    result: list[Span] = []
    for span in sorted(span for span in spans if span.start < span.stop):
        if result and result[-1].file == span.file and result[-1].stop >= span.start:
            result[-1] = Span(span.file, result[-1].start, max(result[-1].stop, span.stop))
        else:
            result.append(span)
    return result


def pack(spans: Sequence[Span]) -> bytes:
    return array("q", [number for span in spans for number in (span.file, span.start, span.stop)]).tobytes()


def unpack(data: bytes, sizes_bytes: Sequence[int]) -> list[Span]:
    """Raises CheckpointError unless they are ascending spans within files of `sizes_bytes`."""
    if len(data) % (3 * _INT_BYTES):
        raise CheckpointError(f"spans of {len(data)} bytes: each has {3 * _INT_BYTES}")
    numbers = memoryview(data).cast("q")
    spans = [Span(*numbers[at : at + 3]) for at in range(0, len(numbers), 3)]
    for span in spans:
        if not 0 <= span.file < len(sizes_bytes) or not 0 <= span.start < span.stop <= sizes_bytes[span.file]:
            raise CheckpointError(f"{span} lies in none of the {len(sizes_bytes)} files")
    for one, other in itertools.pairwise(spans):
        if (other.file, other.start) <= (one.file, one.stop):
            raise CheckpointError(f"{other} comes after {one}: they should ascend, and not touch")
    return spans


class Pieces:
    """Spans one behind the other, cut into pieces of `piece_bytes`. Towards both ends they are smaller, down to
    `edge_bytes`: what handles a piece as a whole can begin with the first one and ends with the last one."""

    def __init__(
        self, spans: Sequence[Span], piece_bytes: int = PIECE_BYTES, edge_bytes: int = EDGE_PIECE_BYTES
    ) -> None:
        self._spans = spans
        self._piece_bytes, self._edge_bytes = piece_bytes, edge_bytes
        self._ends = list(itertools.accumulate(span.stop - span.start for span in spans))
        self.total_bytes = self._ends[-1] if self._ends else 0
        # Computed, not counted: the other end may speak of an image of a petabyte.
        self._head = [0]
        while self._head[-1] < self.total_bytes and not self._whole_from(self._head[-1]):
            self._head.append(self._after(self._head[-1]))
        self._whole = self._whole_from(self._head[-1])
        self._tail: list[int] = []
        position = self._head[-1] + self._whole * piece_bytes
        while position < self.total_bytes:
            position = self._after(position)
            self._tail.append(position)
        self.count = len(self._head) - 1 + self._whole + len(self._tail)

    def _after(self, position: int) -> int:
        """Where the piece that begins at `position` ends."""
        left = self.total_bytes - position
        return position + min(left, self._piece_bytes, max(self._edge_bytes, min(position, left // 2)))

    def _whole_from(self, position: int) -> int:
        """How many whole pieces follow one another from `position` on."""
        left = self.total_bytes - position
        if self._edge_bytes >= self._piece_bytes:
            return left // self._piece_bytes
        return max(0, left // self._piece_bytes - 1) if position >= self._piece_bytes else 0

    def _start(self, number: int) -> int:
        beyond = number - (len(self._head) - 1)
        if beyond <= 0:
            return self._head[number]
        if beyond <= self._whole:
            return self._head[-1] + beyond * self._piece_bytes
        return self._tail[beyond - self._whole - 1]

    def size_bytes(self, number: int) -> int:
        return self._start(number + 1) - self._start(number)

    def cut(self, number: int) -> list[Span]:
        """The parts of spans that piece `number` consists of. Raises IndexError if there is no such piece."""
        if not 0 <= number < self.count:
            raise IndexError(f"piece {number} of {self.count}")
        position, stop = self._start(number), self._start(number + 1)
        parts = []
        index = bisect.bisect_right(self._ends, position)
        while position < stop:
            span, end = self._spans[index], self._ends[index]
            length = min(end, stop) - position
            first = span.stop - (end - position)
            parts.append(Span(span.file, first, first + length))
            position += length
            index += 1
        return parts


def _bytes(file: int, extent: Extent, first: int, length: int) -> Span:
    """Elements [first, first + length) of a tensor. What is narrower than a byte is owned by whole bytes."""
    bits = DTYPE_BITS[extent.spec.dtype]
    return Span(file, extent.start + first * bits // 8, extent.start + -(-(first + length) * bits // 8))


def _box(file: int, extent: Extent, region: Region) -> Iterator[Span]:
    """The runs that a box consists of, row after row."""
    shape = extent.spec.shape
    if region.flat:
        yield _bytes(file, extent, region.offsets[0], region.sizes[0])
        return
    if not region.numel:
        return
    # Trailing dimensions that the box has whole make up one run with the one before them.
    inner = len(shape) - 1
    while inner > 0 and region.sizes[inner] == shape[inner]:
        inner -= 1
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    length = region.sizes[inner] * strides[inner] if shape else 1
    base = region.offsets[inner] * strides[inner] if shape else 0
    ranges = [range(region.offsets[dim], region.offsets[dim] + region.sizes[dim]) for dim in range(max(inner, 0))]
    for indices in itertools.product(*ranges):
        first = base + sum(index * stride for index, stride in zip(indices, strides, strict=False))
        yield _bytes(file, extent, first, length)
