"""Which bytes a rank owns, against a plain count of elements; pieces are all of them, once."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import DTYPE_BITS, TensorSpec, plan_file
from async_ckpt.core.protocol import Claim
from async_ckpt.core.region import Region
from async_ckpt_saver.hosts.spans import Pieces, Span, merged, pack, spans_of, unpack


@st.composite
def boxes(draw: st.DrawFn) -> tuple[TensorSpec, Region]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    return TensorSpec("b", draw(st.sampled_from(["F32", "U8"])), shape), Region(False, offsets, sizes)


@given(boxes())
def test_a_box_has_the_bytes_of_its_elements(given_box: tuple[TensorSpec, Region]) -> None:
    spec, region = given_box
    files = [plan_file("x", [TensorSpec("a", "F32", (3,)), spec])]
    number = next(n for n, extent in enumerate(files[0].extents) if extent.spec.name == "b")
    claims, _ = pack_claims(files, [Claim(0, number, region)])
    found = {byte for span in spans_of(files, claims, [0]) for byte in range(span.start, span.stop)}
    width = DTYPE_BITS[spec.dtype] // 8
    expected = set()
    ranges = [range(offset, offset + size) for offset, size in zip(region.offsets, region.sizes, strict=True)]
    for indices in itertools.product(*ranges):
        element = sum(index * math.prod(spec.shape[dim + 1 :]) for dim, index in enumerate(indices))
        start = files[0].extents[number].start + element * width
        expected |= set(range(start, start + width))
    assert found == expected


def test_all_claims_of_all_ranks_are_all_bytes_behind_the_headers() -> None:
    specs = [TensorSpec("a", "F32", (4, 2)), TensorSpec("b", "BF16", (6,)), TensorSpec("c", "F32", (4, 4))]
    files = [plan_file("x", specs), plan_file("y", specs[:1])]
    names = {extent.spec.name: n for n, extent in enumerate(files[0].extents)}
    halves = []
    for rank in (0, 1):
        claims, _ = pack_claims(files, [
            Claim(0, names["a"], Region(False, (rank * 2, 0), (2, 2))),
            Claim(0, names["b"], Region.run(rank * 3, 3)),
            Claim(0, names["c"], Region(False, (0, rank * 2), (4, 2))),
            *([Claim(1, 0, Region.whole((4, 2)))] if rank else []),
        ])  # fmt: skip
        halves.append(spans_of(files, claims, range(3 + rank)))
    whole = merged([*halves[0], *halves[1]])
    assert whole == [Span(n, len(file.header), file.total_bytes) for n, file in enumerate(files)]
    assert sum(s.stop - s.start for half in halves for s in half) == sum(s.stop - s.start for s in whole)


@given(st.lists(st.integers(0, 30), min_size=0, max_size=12, unique=True), st.integers(1, 9))
def test_pieces_are_all_of_the_spans_once_and_in_order(edges: list[int], piece_bytes: int) -> None:
    edges = sorted(edges)[: len(edges) // 2 * 2]
    spans = merged(Span(0, *edges[at : at + 2]) for at in range(0, len(edges), 2))
    pieces = Pieces(spans, piece_bytes, piece_bytes)
    cut = [pieces.cut(number) for number in range(pieces.count)]
    assert [sum(p.stop - p.start for p in parts) for parts in cut] == [
        pieces.size_bytes(n) for n in range(pieces.count)
    ]
    laid = [byte for parts in cut for p in parts for byte in range(p.start, p.stop)]
    assert laid == [byte for span in spans for byte in range(span.start, span.stop)]
    assert all(size == piece_bytes for size in map(pieces.size_bytes, range(pieces.count - 1)))
    for number in (-1, pieces.count):
        with pytest.raises(IndexError):
            pieces.cut(number)


@given(st.integers(0, 5000), st.integers(1, 64), st.integers(1, 64))
def test_pieces_are_small_at_both_ends_and_not_many_more(total_bytes: int, one: int, other: int) -> None:
    edge_bytes, piece_bytes = sorted((one, other))
    pieces = Pieces([Span(0, 7, 7 + total_bytes)] if total_bytes else [], piece_bytes, edge_bytes)
    sizes = [pieces.size_bytes(number) for number in range(pieces.count)]
    laid = [byte for number in range(pieces.count) for p in pieces.cut(number) for byte in range(p.start, p.stop)]
    assert laid == list(range(7, 7 + total_bytes))
    assert all(0 < size <= piece_bytes for size in sizes)
    assert not sizes or max(sizes[0], sizes[-1]) <= edge_bytes
    for before, after in itertools.pairwise(sizes):
        assert after <= max(edge_bytes, 2 * before)
    assert len(sizes) <= total_bytes // piece_bytes + 4 * math.log2(piece_bytes / edge_bytes) + 4


def test_pieces_of_a_petabyte_are_not_counted_one_by_one() -> None:
    """Nobody has that much, but whoever says so must not hold up the saver that hears it."""
    pieces = Pieces([Span(0, 0, 1 << 50)])
    assert pieces.count == (1 << 28) + 4  # 1, 1 and 2 MiB and then whole ones, at both ends
    assert sum(map(pieces.size_bytes, (0, 1, 2, pieces.count - 1))) == 5 << 20
    assert pieces.cut(pieces.count - 1) == [Span(0, (1 << 50) - (1 << 20), 1 << 50)]


def test_spans_survive_the_wire_and_lies_do_not() -> None:
    spans = [Span(0, 8, 20), Span(0, 24, 30), Span(1, 0, 4)]
    assert unpack(pack(spans), [30, 4]) == spans
    for lie in ([Span(0, 8, 31)], [Span(2, 0, 1)], [Span(0, 8, 8)], [Span(-1, 0, 4)], [Span(0, 4, 8), Span(0, 8, 9)],
                [Span(1, 0, 1), Span(0, 0, 1)], [Span(0, -1, 4)]):  # fmt: skip
        with pytest.raises(CheckpointError):
            unpack(pack(lie), [30, 4])
    with pytest.raises(CheckpointError):
        unpack(bytes(25), [30, 4])
