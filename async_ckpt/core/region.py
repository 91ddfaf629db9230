"""Which part of a global tensor a rank holds, and whether the parts of all ranks make up the whole.

Two shapes occur: a *box* (DTensor: any sharding of dimensions) and a *flat run* of the row-major flattened tensor
(FSDP1, whose shards ignore row boundaries).
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from .limits import MAX_DIMENSIONS

_Indices = Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]


class Region(msgspec.Struct, frozen=True, array_like=True):
    """`flat` False: the box offsets[d] <= index[d] < offsets[d] + sizes[d] of the global tensor.
    `flat` True: one entry each, a run of elements of the row-major flattened tensor."""

    flat: bool
    offsets: _Indices
    sizes: _Indices

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        return cls(False, (0,) * len(shape), tuple(shape))

    @classmethod
    def run(cls, start: int, numel: int) -> Region:
        return cls(True, (start,), (numel,))
