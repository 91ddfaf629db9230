"""Every byte has exactly one owner, or the error names the tensor that is not whole."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import FileLayout, TensorSpec, plan_file
from async_ckpt.core.protocol import Claim
from async_ckpt.core.region import Region
from async_ckpt_saver.coverage import assign_owners


def one_file(*shapes: tuple[int, ...]) -> list[FileLayout]:
    return [plan_file("a.safetensors", [TensorSpec(f"t{i}", "F32", shape) for i, shape in enumerate(shapes)])]


def rows(tensor: int, start: int, count: int, width: int) -> Claim:
    return Claim(0, tensor, Region(False, (start, 0), (count, width)))


def test_two_halves_make_a_whole() -> None:
    claims = {0: [rows(0, 0, 3, 4)], 1: [rows(0, 3, 2, 4)]}
    assert assign_owners(one_file((5, 4)), claims).owned == {0: [0], 1: [0]}


def test_an_empty_tensor_needs_no_owner() -> None:
    assert assign_owners(one_file((0, 4)), {0: []}).owned == {0: []}


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({0: [], 1: []}, "no rank holds tensor 't0'"),
        ({0: [rows(0, 0, 2, 4)], 1: [rows(0, 3, 2, 4)]}, "hold 16 of its 20 elements"),
        ({0: [rows(0, 0, 3, 4)], 1: [rows(0, 2, 3, 4)]}, "'t0': two ranks hold parts that overlap"),
        ({0: [rows(0, 0, 3, 4)], 1: [Claim(0, 0, Region.run(12, 8))]}, "sharded in two different ways"),
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
        assign_owners(one_file((5, 4)), claims)


def test_replicas_are_shared_out_by_bytes() -> None:
    shapes = [(8, 8), (4, 8), (4, 8), (2, 8), (2, 8)]
    claims = {rank: [Claim(0, t, Region.whole(shape)) for t, shape in enumerate(shapes)] for rank in range(2)}
    owned = assign_owners(one_file(*shapes), claims).owned
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
        owned = assign_owners(one_file(shape), claims).owned
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
    owned = assign_owners(one_file((height, width)), claims).owned
    covered = [c for rank in owned for index in owned[rank] for c in cells((height, width), claims[rank][index].region)]
    assert sorted(covered) == list(range(height * width))
