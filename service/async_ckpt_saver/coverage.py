"""Do the parts that the ranks hold make up every tensor, and who copies what more than one rank holds? Pure.

Guarantee: if `assign_owners` returns, each byte of each tensor is owned by exactly one claim; otherwise it raises
CheckpointError naming the first tensor that is not whole. A wrong file cannot follow from a granted run.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import FileLayout
from async_ckpt.core.protocol import Claim
from async_ckpt.core.region import Region

Holders = dict[Region, list[tuple[int, int]]]  # region -> (rank, index of the claim) of each rank that holds it


class Ownership(msgspec.Struct, frozen=True):
    """For each rank the indices of its claims that it owns, and of those that other ranks hold as well."""

    owned: dict[int, list[int]]
    replicated: dict[int, list[int]]


def assign_owners(files: Sequence[FileLayout], claims: Mapping[int, Sequence[Claim]]) -> Ownership:
    """Who writes what.

    Raises CheckpointError if a claim does not fit its tensor, or if claims leave a gap or overlap without being equal.
    Replicas (equal claims) go to the rank with the fewest bytes so far, largest first (LPT).
    """
    tensors: dict[tuple[int, int], Holders] = defaultdict(lambda: defaultdict(list))
    for rank, rank_claims in claims.items():
        for index, claim in enumerate(rank_claims):
            _check_fit(files, rank, claim)
            tensors[claim.file, claim.tensor][claim.region].append((rank, index))
    for file_index, file in enumerate(files):
        for tensor_index, extent in enumerate(file.extents):
            if extent.spec.numel:
                holders = tensors.get((file_index, tensor_index), {})
                _check_whole(extent.spec.name, extent.spec.shape, holders)
    replicated: dict[int, list[int]] = {rank: [] for rank in claims}
    for holders in tensors.values():
        for who in holders.values():
            for rank, index in who if len(who) > 1 else ():
                replicated[rank].append(index)
    return Ownership(_balance(files, tensors, claims.keys()), replicated)


def _check_fit(files: Sequence[FileLayout], rank: int, claim: Claim) -> None:
    if not (0 <= claim.file < len(files) and 0 <= claim.tensor < len(files[claim.file].extents)):
        raise CheckpointError(f"rank {rank} claims tensor {claim.tensor} of file {claim.file}, which does not exist")
    spec = files[claim.file].extents[claim.tensor].spec
    region, shape = claim.region, (spec.numel,) if claim.region.flat else spec.shape
    fits = len(region.offsets) == len(region.sizes) == len(shape) and all(
        offset >= 0 and size > 0 and offset + size <= length
        for offset, size, length in zip(region.offsets, region.sizes, shape, strict=True)
    )
    if not fits:
        raise CheckpointError(f"rank {rank} claims {region} of tensor {spec.name!r}, whose shape is {list(shape)}")


def _check_whole(name: str, shape: tuple[int, ...], holders: Mapping[Region, object]) -> None:
    regions = list(holders)
    if not regions:
        raise CheckpointError(f"no rank holds tensor {name!r} of shape {list(shape)}: it would be missing in the file")
    if len({region.flat for region in regions}) > 1:
        raise CheckpointError(f"tensor {name!r} is sharded in two different ways on different ranks: {regions[:4]}")
    numel = 1
    for length in shape:
        numel *= length
    covered = sum(region.numel for region in regions)
    overlap = _overlapping(regions)
    if overlap is not None:
        raise CheckpointError(f"tensor {name!r}: two ranks hold parts that overlap but differ: {overlap}")
    if covered != numel:
        raise CheckpointError(f"tensor {name!r}: the ranks hold {covered} of its {numel} elements; "
                              f"the rest is on no rank that registered")  # fmt: skip


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


def _balance(
    files: Sequence[FileLayout], tensors: Mapping[tuple[int, int], Holders], ranks: Iterable[int]
) -> dict[int, list[int]]:
    owned: dict[int, list[int]] = {rank: [] for rank in sorted(ranks)}
    load_bytes = dict.fromkeys(owned, 0)
    shared = []
    for (file, tensor), holders in tensors.items():
        spec = files[file].extents[tensor].spec
        for region, who in holders.items():
            nbytes = region.numel * spec.nbytes // spec.numel
            if len(who) == 1:
                owned[who[0][0]].append(who[0][1])
                load_bytes[who[0][0]] += nbytes
            else:
                shared.append((-nbytes, file, tensor, sorted(who)))
    heapq.heapify(shared)
    while shared:
        negative_bytes, _, _, who = heapq.heappop(shared)
        rank, index = min(who, key=lambda holder: (load_bytes[holder[0]], holder[0]))
        owned[rank].append(index)
        load_bytes[rank] -= negative_bytes
    return {rank: sorted(indices) for rank, indices in owned.items()}
