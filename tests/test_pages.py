"""Runs of pages against sets of pages."""

from __future__ import annotations

import itertools
import mmap

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.pages import page_runs, span_of

_PAGE = 16

spans = st.lists(
    st.tuples(st.integers(0, 40 * _PAGE), st.integers(0, 5 * _PAGE)).map(lambda each: (each[0], sum(each)))
)


def pages_of(parts: list[tuple[int, int]]) -> set[int]:
    return {byte // _PAGE for start, stop in parts for byte in range(start, stop)}


@settings(max_examples=200, deadline=None)
@given(spans)
def test_runs_are_the_own_pages_and_single_ones_between_them(parts: list[tuple[int, int]]) -> None:
    own = pages_of(parts)
    expected = own | {page for page in range(200) if page - 1 in own and page + 1 in own}
    runs = page_runs(parts, page_bytes=_PAGE)
    assert [page for start, stop in runs for page in range(start // _PAGE, stop // _PAGE)] == sorted(expected)
    assert all(start % _PAGE == stop % _PAGE == 0 and start < stop for start, stop in runs)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(runs)), "else they were one run"


@settings(max_examples=200, deadline=None)
@given(spans, st.integers(1, 6))
def test_a_limit_costs_the_pages_of_the_smallest_gaps_and_no_more(parts: list[tuple[int, int]], limit: int) -> None:
    own = pages_of(parts)
    free = page_runs(parts, page_bytes=_PAGE)
    runs = page_runs(parts, limit, page_bytes=_PAGE)
    held = [page for start, stop in runs for page in range(start // _PAGE, stop // _PAGE)]
    assert own <= set(held)
    assert held == sorted(set(held)), "none twice"
    assert len(runs) == min(limit, len(free))
    ordered = sorted(own)
    gaps = sorted(after - before - 1 for before, after in itertools.pairwise(ordered) if after - before > 2)
    single = sum(after - before == 2 for before, after in itertools.pairwise(ordered))
    closed = gaps[: max(0, len(gaps) + 1 - limit)]
    assert len(held) - len(own) == single + sum(closed)


@settings(max_examples=150, deadline=None)
@given(spans, st.one_of(st.none(), st.integers(1, 4)))
def test_every_part_lies_in_one_run(parts: list[tuple[int, int]], limit: int | None) -> None:
    """CUDA copies no memory that reaches from one registration into the next one."""
    runs = page_runs(parts, limit, page_bytes=_PAGE)
    for start, stop in parts:
        assert start == stop or sum(first <= start and stop <= last for first, last in runs) == 1


def test_the_pages_are_those_of_this_machine() -> None:
    assert page_runs([(mmap.PAGESIZE - 1, mmap.PAGESIZE + 1)]) == [(0, 2 * mmap.PAGESIZE)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_span_is_from_the_first_byte_to_the_last(data: st.DataObject) -> None:
    """Every element is marked in the storage, and looked for."""
    shape = data.draw(st.lists(st.integers(0, 4), min_size=0, max_size=3))
    whole = torch.zeros([size + 2 for size in shape], dtype=torch.int16)
    view = whole
    for dim, size in enumerate(shape):
        view = view.narrow(dim, data.draw(st.integers(0, 2)), size)
    view.fill_(-1)
    marked = [index for index, byte in enumerate(whole.view(-1).view(torch.uint8).tolist()) if byte]
    start, stop = span_of(view, whole.data_ptr())
    assert (start, stop) == (marked[0], marked[-1] + 1) if marked else start == stop
