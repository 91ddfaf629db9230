"""A picture of one shape: how long training stands still, and how long until the checkpoint is on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from html import escape

from .summary import Summary

_WIDTH, _ROW, _LABEL, _BAR = 860, 24, 250, 230
_OURS, _THEIRS, _TEXT = "#0b7a4b", "#9aa5b1", "#24292f"


def picture(ways: Mapping[str, Summary]) -> str:
    """An SVG with two columns of bars on logarithmic scales, the fastest way first."""
    rows = sorted(ways.values(), key=lambda way: way.stall_s.median)
    height = 70 + _ROW * len(rows)
    columns: list[tuple[str, Callable[[Summary], float]]] = [
        ("training stands still, ms (log)", lambda way: way.stall_s.median),
        ("on disk after, ms (log)", lambda way: way.durable_s.median),
    ]
    size = f'width="{_WIDTH}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">',
        f'<rect {size} fill="#ffffff"/>',
    ]
    for place, (title, figure) in enumerate(columns):
        lines += _column(_LABEL + place * (_BAR + 80), title, rows, figure)
    for number, way in enumerate(rows):
        label = escape(way.title + ("" if way.durable else " (not synced)"))
        lines.append(f'<text x="{_LABEL - 10}" y="{_y(number) + 13}" text-anchor="end" fill="{_TEXT}">{label}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _column(x: int, title: str, rows: list[Summary], figure: Callable[[Summary], float]) -> Iterator[str]:
    yield f'<text x="{x}" y="28" font-weight="bold" fill="{_TEXT}">{title}</text>'
    low = math.floor(math.log10(min(map(figure, rows)) * 1e3))
    high = math.ceil(math.log10(max(map(figure, rows)) * 1e3))
    for number, way in enumerate(rows):
        value = figure(way) * 1e3
        width = max(2.0, (math.log10(value) - low) / max(high - low, 1) * _BAR)
        colour = _OURS if way.title.startswith("async_ckpt") else _THEIRS
        shown = f"{value:.2g}" if value < 10 else f"{value:.0f}"
        yield f'<rect x="{x}" y="{_y(number)}" width="{width:.1f}" height="{_ROW - 7}" fill="{colour}"/>'
        yield f'<text x="{x + width + 5:.1f}" y="{_y(number) + 13}" fill="{_TEXT}">{shown}</text>'


def _y(number: int) -> int:
    return 44 + number * _ROW
