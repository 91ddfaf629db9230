"""What a rank says that it holds, packed: thousands of ranks say it at once, and the saver has to prove it complete.

All tensors of all files lie one behind the other on one *line* of elements, in the files' order. What FSDP cuts by rows
or by elements is a run on that line, so two integers say it. Anything else is a *box*.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence

import msgspec

from .layout import Extent, FileLayout
from .protocol import Claim, Claims


class Line(msgspec.Struct, frozen=True):
    """`extents` are the tensors of all files, in order; tensor i has the elements [starts[i], starts[i + 1]); `first`
    is the number of each file's first tensor."""

    extents: list[Extent]
    starts: list[int]
    first: list[int]

    @classmethod
    def of(cls, files: Sequence[FileLayout]) -> Line:
        extents = [extent for file in files for extent in file.extents]
        starts = [0, *itertools.accumulate(extent.spec.numel for extent in extents)]
        first = [0, *itertools.accumulate(len(file.extents) for file in files)]
        return cls(extents, starts, first)

    def number(self, claim: Claim) -> int | None:
        """Which tensor `claim` is of; None if there is no such tensor."""
        if not 0 <= claim.file < len(self.first) - 1 or claim.tensor < 0:
            return None
        number = self.first[claim.file] + claim.tensor
        return number if number < self.first[claim.file + 1] else None


def pack_claims(files: Sequence[FileLayout], claims: Sequence[Claim]) -> tuple[Claims, list[int]]:
    """`claims` as they are sent, and for each of them, in the order in which they are numbered then, its index in
    `claims`."""
    line = Line.of(files)
    runs, boxes = [], []
    for index, claim in enumerate(claims):
        run = _run(line, claim)
        if run is None:
            boxes.append(index)
        else:
            runs.append((*run, index))
    runs.sort()
    packed = Claims(
        starts=array("q", [start for start, _, _ in runs]).tobytes(),
        lengths=array("q", [length for _, length, _ in runs]).tobytes(),
        boxes=[claims[index] for index in boxes],
    )
    return packed, [index for _, _, index in runs] + boxes


def _run(line: Line, claim: Claim) -> tuple[int, int] | None:
    """Start and length on the line, of a run of elements or of whole rows; None for everything else, also for what
    does not fit its tensor."""
    number = line.number(claim)
    if number is None:
        return None
    spec, region = line.extents[number].spec, claim.region
    offsets, sizes = region.offsets, region.sizes
    if region.flat:
        if len(offsets) != 1 or len(sizes) != 1:
            return None
        start, length = offsets[0], sizes[0]
    else:
        if len(offsets) != len(spec.shape) or len(sizes) != len(spec.shape):
            return None
        if sizes[1:] != spec.shape[1:] or any(offsets[1:]):
            return None
        row = math.prod(spec.shape[1:])
        start, length = (offsets[0] * row, sizes[0] * row) if offsets else (0, 1)
    if start < 0 or length <= 0 or start + length > spec.numel:
        return None
    return line.starts[number] + start, length
