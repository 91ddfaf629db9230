"""A trace as a picture, for pages: `python -m benchmarks.timeline save.json docs/trace.svg --steps 4 6`."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from async_ckpt.trace_file import read_events

_WIDTH, _LEFT, _ROW, _GAP = 1000, 130, 17, 10
_COLOURS = {"save": "#b3261e", "fence": "#b3261e", "wait for slot": "#e07a5f", "copy": "#1a73e8", "gather": "#9aa5b1",
            "queued": "#c7ccd1", "commit": "#0b7a4b", "retention": "#8d6e63", "write": "#3aa675", "fsync": "#f2a541",
            "manifest": "#7b5ea7", "rename": "#7b5ea7", "latest": "#7b5ea7", "prepare": "#7b5ea7"}  # fmt: skip
_DEFAULT = "#e8eef4"  # what holds others


def picture(events: Sequence[dict[str, Any]], steps: range) -> str:
    """An SVG of the spans of `steps`, from the first save to the last outcome: a band a track, what lies within a span
    below it. The fence comes with the next optimizer step, much later mostly: it is shown if it does not."""
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events
             if event["name"] in ("process_name", "thread_name")}  # fmt: skip
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X" and event["args"].get("step") in steps:
            tracks[event["pid"], event["tid"]].append(event)
    every = [event for track in tracks.values() for event in track]
    start = min(event["ts"] for event in every)
    stop = max(event["ts"] + event["dur"] for event in every if event["name"] != "fence")
    scale = (_WIDTH - _LEFT - 20) / (stop - start)
    lines, parts, y = list[str](), list[str](), 34.0
    for key in sorted(tracks):
        process = names[key[0], 0].partition(" (")[0]
        parts.append(_text(8, y + 12, f"{process}, {names[key]}"))
        depth = 0
        for level, event in _levels([event for event in tracks[key] if event["ts"] <= stop]):
            depth = max(depth, level + 1)
            x, width = _LEFT + (event["ts"] - start) * scale, max(event["dur"] * scale, 0.8)
            name, top = event["name"], y + level * _ROW
            colour = _COLOURS.get(name) or _COLOURS.get(name.split()[0], _DEFAULT)
            title = f"<title>{name}: {event['dur'] / 1000:.3f} ms</title>"
            parts.append(f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_ROW - 2}" fill="{colour}">'
                         f"{title}</rect>")  # fmt: skip
            shown = name[: int(width / 6.2)]
            if len(shown) == len(name) or len(shown) > 8:
                dark = "#24292f" if colour in (_DEFAULT, "#c7ccd1", "#f2a541") else "#ffffff"
                parts.append(_text(x + 3, top + 11.5, shown, dark, 10))
        y += depth * _ROW + _GAP
    for at in _ticks((stop - start) / 1000):
        x = _LEFT + at * scale * 1000
        parts.append(_text(x, 18, f"{at} ms"))
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="24" y2="{y:.0f}" stroke="#d0d7de"/>')
    size = f'width="{_WIDTH}" height="{y:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n<rect {size} fill="#ffffff"/>'
    return "\n".join([head, *lines, *parts, "</svg>\n"])


def _levels(track: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    found, ends = list[tuple[int, dict[str, Any]]](), list[int]()
    for event in sorted(track, key=lambda event: (event["ts"], -event["dur"])):
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        found.append((len(ends), event))
        ends.append(event["ts"] + event["dur"])
    return found


def _ticks(length_ms: float) -> list[int]:
    every = next(
        each for each in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10**9) if length_ms / each < 12
    )
    return list(range(0, int(length_ms) + 1, every))


def _text(x: float, y: float, text: str, fill: str = "#24292f", size: int = 12) -> str:
    safe = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}">{safe}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--steps", type=int, nargs=2, default=(0, 10**18), metavar=("FIRST", "LAST"))
    options = parser.parse_args()
    options.svg.write_text(picture(read_events(options.trace), range(options.steps[0], options.steps[1] + 1)))


if __name__ == "__main__":
    main()
