"""Do boxes make up a tensor? For what is sharded by other dimensions than its rows: tensor parallelism. Pure."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from async_ckpt.core.claims import Line
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.protocol import Claim
from async_ckpt.core.region import Region

Holders = dict[Region, list[tuple[int, int]]]  # region -> (rank, number of the claim) of each rank that holds it


def gather_boxes(line: Line, boxes: Mapping[int, tuple[int, Sequence[Claim]]]) -> dict[int, Holders]:
    """The holders of each tensor of which there are boxes, by its number. `boxes`: a rank's, and the number of its
    first. Raises CheckpointError if one does not fit its tensor."""
    found: dict[int, Holders] = defaultdict(lambda: defaultdict(list))
    for rank, (first, claims) in boxes.items():
        for index, claim in enumerate(claims, first):
            found[_fitting(line, rank, claim)][claim.region].append((rank, index))
    return found


def check_boxes(line: Line, number: int, holders: Mapping[Region, object]) -> None:
    """Raises CheckpointError unless the boxes make up tensor `number`, each element once."""
    spec, regions = line.extents[number].spec, list(holders)
    if len({region.flat for region in regions}) > 1:
        raise CheckpointError(
            f"tensor {spec.name!r} is sharded in two different ways on different ranks: {regions[:4]}"
        )
    covered = sum(region.numel for region in regions)
    overlap = _overlapping(regions)
    if overlap is not None:
        raise CheckpointError(f"tensor {spec.name!r}: two ranks hold parts that overlap but differ: {overlap}")
    if covered != spec.numel:
        raise CheckpointError(f"tensor {spec.name!r}: the ranks hold {covered} of its {spec.numel} elements; "
                              f"the rest is on no rank that registered")  # fmt: skip


def _fitting(line: Line, rank: int, claim: Claim) -> int:
    number = line.number(claim)
    if number is None:
        raise CheckpointError(f"rank {rank} claims tensor {claim.tensor} of file {claim.file}, which does not exist")
    spec = line.extents[number].spec
    region, shape = claim.region, (spec.numel,) if claim.region.flat else spec.shape
    fits = len(region.offsets) == len(region.sizes) == len(shape) and all(
        offset >= 0 and size > 0 and offset + size <= length
        for offset, size, length in zip(region.offsets, region.sizes, shape, strict=True)
    )
    if not fits:
        raise CheckpointError(f"rank {rank} claims {region} of tensor {spec.name!r}, whose shape is {list(shape)}")
    return number


def _overlapping(regions: list[Region]) -> tuple[Region, Region] | None:
    """A pair of regions that share an element. Sorted along the one dimension in which they differ, neighbours
    suffice; regions that differ in several dimensions (tensor parallel x FSDP) are compared pair by pair."""
    differing = [
        dim for dim in range(len(regions[0].offsets)) if len({(r.offsets[dim], r.sizes[dim]) for r in regions}) > 1
    ]
    if len(differing) <= 1:
        dim = differing[0] if differing else 0
        ordered = sorted(regions, key=lambda region: region.offsets[dim : dim + 1])
        pairs = itertools.pairwise(ordered)
        return next(((a, b) for a, b in pairs if a.offsets[dim] + a.sizes[dim] > b.offsets[dim]), None)
    ordered = sorted(regions, key=lambda region: region.offsets)
    for position, a in enumerate(ordered):
        for b in ordered[position + 1 :]:
            if b.offsets[0] >= a.offsets[0] + a.sizes[0]:
                break
            if all(x < y + m and y < x + n for x, n, y, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)):
                return a, b
    return None
