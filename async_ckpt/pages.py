"""Whole pages that hold a rank's own bytes of a mapped file, in few runs: each run costs a system call."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch

Span = tuple[int, int]  # bytes [start, stop)

_GAP_PAGES = 1  # a page between two parts costs less than another run


def page_runs(spans: Iterable[Span], limit: int | None = None, page_bytes: int = mmap.PAGESIZE) -> list[Span]:
    """Ascending runs of whole pages, none of which touches another, with every byte of `spans` in them. A span lies in
    one run. Gaps of one page are in it as well; and with `limit`, so many of the smallest gaps that no more runs than
    that are left."""
    runs: list[list[int]] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        first, last = start // page_bytes * page_bytes, -(-stop // page_bytes) * page_bytes
        if runs and first <= runs[-1][1] + _GAP_PAGES * page_bytes:
            runs[-1][1] = max(runs[-1][1], last)
        else:
            runs.append([first, last])
    if limit is not None and len(runs) > limit:
        by_gap = sorted(range(1, len(runs)), key=lambda index: runs[index - 1][1] - runs[index][0])
        begins = [0, *sorted(by_gap[: limit - 1])]
        ends = [*begins[1:], len(runs)]
        return [(runs[begin][0], runs[end - 1][1]) for begin, end in zip(begins, ends, strict=True)]
    return [(first, last) for first, last in runs]


def span_of(view: torch.Tensor, base: int) -> Span:
    """The bytes from address `base` within which `view` lies: a rank's own part of a large tensor."""
    start = view.data_ptr() - base
    if not view.numel():
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return start, start + (last + 1) * view.element_size()
