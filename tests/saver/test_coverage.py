"""Every byte has exactly one owner, or the error names the tensor that is not whole."""

from __future__ import annotations

import itertools
import math
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import FileLayout, TensorSpec, plan_file
from async_ckpt.core.protocol import Claim, Claims
from async_ckpt.core.region import Region
from async_ckpt_saver import coverage
from async_ckpt_saver.coverage import assign_owners


def one_file(*shapes: tuple[int, ...]) -> list[FileLayout]:
    return [plan_file("a.safetensors", [TensorSpec(f"t{i}", "F32", shape) for i, shape in enumerate(shapes)])]


def granted(files: list[FileLayout], claims: dict[int, list[Claim]]) -> dict[int, list[int]]:
    """Who owns which of the claims, as given here."""
    packed = {rank: pack_claims(files, each) for rank, each in claims.items()}
    owned = assign_owners(files, {rank: each for rank, (each, _) in packed.items()}).owned
    return {rank: sorted(packed[rank][1][number] for number in numbers) for rank, numbers in owned.items()}


def rows(tensor: int, start: int, count: int, width: int) -> Claim:
    return Claim(0, tensor, Region(False, (start, 0), (count, width)))


def test_two_halves_make_a_whole() -> None:
    claims = {0: [rows(0, 0, 3, 4)], 1: [rows(0, 3, 2, 4)]}
    assert granted(one_file((5, 4)), claims) == {0: [0], 1: [0]}


def test_rows_and_a_run_of_elements_make_a_whole() -> None:
    claims = {0: [rows(0, 0, 3, 4)], 1: [Claim(0, 0, Region.run(12, 8))]}
    assert granted(one_file((5, 4)), claims) == {0: [0], 1: [0]}


def test_an_empty_tensor_needs_no_owner() -> None:
    assert granted(one_file((0, 4)), {0: []}) == {0: []}


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({0: [], 1: []}, "no rank holds tensor 't0'"),
        ({0: [rows(0, 0, 2, 4)], 1: [rows(0, 3, 2, 4)]}, "hold 16 of its 20 elements"),
        ({0: [rows(0, 0, 3, 4)], 1: [rows(0, 2, 3, 4)]}, "'t0': two ranks hold parts that overlap"),
        (
            {0: [Claim(0, 0, Region(False, (0, 0), (5, 2)))], 1: [Claim(0, 0, Region.run(10, 10))]},
            "sharded in two different ways",
        ),
        (
            {
                0: [Claim(0, 0, Region(False, (0, 0), (5, 2)))],
                1: [Claim(0, 0, Region(False, (0, 2), (5, 2)))],
                2: [rows(0, 0, 5, 4)],
            },
            "sharded in two different ways",
        ),
        ({0: [rows(0, 0, 6, 4)]}, "rank 0 claims"),
        ({0: [rows(0, -1, 3, 4)]}, "rank 0 claims"),
        ({0: [rows(0, 0, 0, 4)]}, "rank 0 claims"),
        ({0: [Claim(0, 0, Region(False, (0,), (5,)))]}, "rank 0 claims"),
        ({0: [Claim(0, 0, Region(True, (0, 0), (5, 4)))]}, "rank 0 claims"),
        ({0: [rows(1, 0, 5, 4)]}, "which does not exist"),
        ({0: [Claim(3, 0, Region.whole((5, 4)))]}, "which does not exist"),
    ],
)
def test_what_is_not_whole_is_named(claims: dict[int, list[Claim]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        granted(one_file((5, 4)), claims)


def test_replicas_are_shared_out_by_bytes() -> None:
    shapes = [(8, 8), (4, 8), (4, 8), (2, 8), (2, 8)]
    claims = {rank: [Claim(0, t, Region.whole(shape)) for t, shape in enumerate(shapes)] for rank in range(2)}
    owned = granted(one_file(*shapes), claims)
    assert sorted(itertools.chain(*owned.values())) == [0, 1, 2, 3, 4]
    load = [sum(math.prod(shapes[index]) for index in owned[rank]) for rank in range(2)]
    assert load == [80, 80]


def cells(shape: tuple[int, ...], region: Region) -> set[int]:
    """The flat indices of a region, by enumeration."""
    if region.flat:
        return set(range(region.offsets[0], region.offsets[0] + region.sizes[0]))
    ranges = [range(offset, offset + size) for offset, size in zip(region.offsets, region.sizes, strict=True)]
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return {sum(i * stride for i, stride in zip(index, strides, strict=True)) for index in itertools.product(*ranges)}


@st.composite
def claimed_tensor(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[int, list[Claim]]]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    claims: dict[int, list[Claim]] = {}
    for rank in range(draw(st.integers(1, 4))):
        claims[rank] = []
        for _ in range(draw(st.integers(0, 2))):
            if draw(st.booleans()):
                offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
                sizes = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
                region = Region(False, offsets, sizes)
            else:
                start = draw(st.integers(0, math.prod(shape) - 1))
                region = Region.run(start, draw(st.integers(1, math.prod(shape) - start)))
            claims[rank].append(Claim(0, 0, region))
    return shape, claims


@settings(max_examples=1500, deadline=None)
@given(claimed_tensor())
def test_granted_means_that_every_element_has_one_owner(case: tuple[tuple[int, ...], dict[int, list[Claim]]]) -> None:
    shape, claims = case
    try:
        owned = granted(one_file(shape), claims)
    except CheckpointError:
        return
    owners = [0] * math.prod(shape)
    for rank, indices in owned.items():
        for index in indices:
            for cell in cells(shape, claims[rank][index].region):
                owners[cell] += 1
    assert owners == [1] * math.prod(shape)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_every_real_sharding_is_granted(height: int, width: int, down: int, across: int, replicas: int) -> None:
    """Shard(0), Shard(1), their product, and replicas of them, uneven and empty shards included."""
    row_step, column_step = -(-height // down), -(-width // across)
    claims: dict[int, list[Claim]] = {}
    for replica in range(replicas):
        for i, j in itertools.product(range(down), range(across)):
            top, left = min(i * row_step, height), min(j * column_step, width)
            sizes = (min(row_step, height - top), min(column_step, width - left))
            claim = Claim(0, 0, Region(False, (top, left), sizes))
            claims[replica * down * across + i * across + j] = [claim] if math.prod(sizes) else []
    owned = granted(one_file((height, width)), claims)
    covered = [c for rank in owned for index in owned[rank] for c in cells((height, width), claims[rank][index].region)]
    assert sorted(covered) == list(range(height * width))


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[tuple[int, int, int]], int]:
    """Tensors, cut into runs anywhere: (tensor, start, length) of each."""
    shapes = [(draw(st.integers(0, 6)), draw(st.integers(1, 3))) for _ in range(draw(st.integers(1, 5)))]
    runs = []
    for number, shape in enumerate(shapes):
        numel = math.prod(shape)
        cuts = sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=3))})
        runs += [(number, start, stop - start) for start, stop in itertools.pairwise(cuts)]
    return shapes, runs, draw(st.integers(1, 4))


@settings(max_examples=400, deadline=None)
@given(cut_tensors(), st.data(), st.integers(1, 8))
def test_runs_of_many_tensors_are_owned_once_wherever_they_lie_and_a_missing_one_is_found(
    case: tuple[list[tuple[int, ...]], list[tuple[int, int, int]], int], data: st.DataObject, stretch_runs: int
) -> None:
    shapes, runs, world = case
    files = [*one_file(*shapes[:2]), *one_file(*shapes[2:])]
    claims: dict[int, list[Claim]] = {rank: [] for rank in range(world)}
    held: dict[tuple[int, int, int], set[int]] = {}
    for run in runs:
        number, start, length = run
        held[run] = data.draw(st.sets(st.integers(0, world - 1), min_size=1))
        for rank in held[run]:
            claim = Claim(number // 2 and 1, number if number < 2 else number - 2, Region.run(start, length))
            claims[rank].append(claim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage, "_MOST_RUNS", stretch_runs)
        owned = granted(files, claims)
        owners = [
            (claim.file, claim.tensor, claim.region)
            for rank in owned
            for claim in map(claims[rank].__getitem__, owned[rank])
        ]
        assert len(owners) == len(set(owners)) == len(runs)
        packed = {rank: pack_claims(files, each)[0] for rank, each in claims.items()}
        replicated = assign_owners(files, packed).replicated
        assert sum(map(len, replicated.values())) == sum(len(who) for who in held.values() if len(who) > 1)
        if runs:
            number, start, length = lost = data.draw(st.sampled_from(runs))
            for rank in held[lost]:
                claims[rank] = [
                    c
                    for c in claims[rank]
                    if not (c.region == Region.run(start, length) and (c.file * 2 + c.tensor) == number)
                ]
            with pytest.raises(CheckpointError, match=r"no rank holds tensor|the ranks hold"):
                granted(files, claims)


@pytest.mark.parametrize(
    ("starts", "lengths", "message"),
    [
        ([0, 6], [6, 14], None),
        ([0], [21], "beyond the last"),
        ([0, 0], [10, 20], "out of order"),
        ([6, 0], [14, 6], "out of order"),
        ([0, 20], [20, 0], "empty"),
        ([-1], [21], "beyond the last"),
        ([0, 2], [2, 18], "beyond its 6"),
        ([0, 6], [6], "bytes of starts"),
    ],
)
def test_runs_that_no_rank_of_ours_would_claim(starts: list[int], lengths: list[int], message: str | None) -> None:
    """Two tensors of 6 and 14 elements, and what a broken or a hostile client may send."""
    claims = {0: Claims(array("q", starts).tobytes(), array("q", lengths).tobytes(), [])}
    files = one_file((6,), (14,))
    if message is None:
        assert assign_owners(files, claims).owned == {0: [0, 1]}
        return
    with pytest.raises(CheckpointError, match=message):
        assign_owners(files, claims)
