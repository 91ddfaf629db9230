"""From measurements to what people read: a table, verdicts, a picture. `python -m benchmarks.report` makes them again
from `benchmarks/results/bench.json`, and puts them into docs/benchmarks.md, docs/scale.md and the README."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import scale
from .big_jobs import big_jobs
from .catalogue import MAIN_SHAPE
from .goals import verdicts
from .picture import picture
from .summary import Spread, Summary, summaries

HOME = Path(__file__).resolve().parent
RESULTS = HOME / "results"
_DOCS = HOME.parent / "docs"
_COLUMNS = (
    ("way of saving", 34), ("setup+first", 12), ("call", 9), ("max", 9), ("call+fence", 11), ("durable (min-max)", 22),
    ("CPU", 8), ("extra loop", 11), ("helpers USS/PSS", 16), ("disk", 7),
)  # fmt: skip


def write(run: dict[str, Any], results: Path) -> str:
    """Write the JSON, the text and the picture of `run` into `results`; return the text."""
    results.mkdir(parents=True, exist_ok=True)
    text = render(run)
    (results / "bench.json").write_text(json.dumps(run, indent=1) + "\n")
    (results / "bench.txt").write_text(text + "\n")
    if MAIN_SHAPE in run["shapes"]:
        (results / "bench.svg").write_text(picture(summaries(run["shapes"][MAIN_SHAPE])))
    return text


def render(run: dict[str, Any]) -> str:
    """The whole output of `make bench`."""
    return "\n".join([
        ", ".join(f"{name} {value}" for name, value in run["machine"].items()),
        f"filesystem {run['filesystem']}; {run['seconds']:.0f} s in all; times in ms, medians; memory in MB",
        *(line for shape in run["shapes"].values() for line in _shape(shape)),
        *_beside(run),
        *_verdicts(run),
    ])  # fmt: skip


def _shape(shape: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{shape['title']}, {shape['world']} ranks"
    yield "".join(f"{name:<{width}}" if name == "way of saving" else f"{name:>{width}}" for name, width in _COLUMNS)
    for way in summaries(shape).values():
        yield _row(way, shape["bytes"])
    for name, values in shape["limits"].items():
        spread = Spread.of(values)
        yield f"  limit: {name:<34} {_ms(spread.median):>8} ({_ms(spread.least)}-{_ms(spread.most)})"


def _row(way: Summary, nbytes: int) -> str:
    cells = [
        _ms(way.first_s),
        _ms(way.call_s.median),
        _ms(way.call_s.most),
        _ms(way.stall_s.median),
        f"{_ms(way.durable_s.median)} ({_ms(way.durable_s.least)}-{_ms(way.durable_s.most)})" + " *"[not way.durable],
        _ms(way.cpu_s.median),
        _ms(way.extra_s.median) if way.extra_s is not None else "",
        f"{way.uss_bytes / 1e6:.0f}/{way.pss_bytes / 1e6:.0f}" if way.helpers else "none",
        f"{way.disk_bytes / nbytes:.4f}",
    ]
    widths = [width for _, width in _COLUMNS[1:]]
    return f"{way.title:<34}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _beside(run: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield "* not synced: a power loss may take it. call: what the loop executes to save, state dict included."
    yield "  call+fence: with the wait of an optimizer step that follows at once. durable: until its future says so."
    main = run["shapes"].get(MAIN_SHAPE)
    if main is not None:
        times = {kind: statistics.median(values) for kind, values in main["restores"].items()}
        yield ("restore, a rank's part: from RAM {ram}, from a cold disk {disk}, flat memcpy {memcpy}"
               .format(**{kind: _ms(value) + " ms" for kind, value in times.items()}))  # fmt: skip
        gpu = main["gpu"]
        yield "GPU: no GPU" if gpu is None else f"GPU: {json.dumps(gpu)}"
    yield ""
    yield from scale.table(run["scale"])


def _verdicts(run: dict[str, Any]) -> Iterator[str]:
    yield ""
    if MAIN_SHAPE not in run["shapes"]:
        yield "goals are judged in a run that measures every shape"
        return
    found = verdicts(run)
    yield f"goals: {sum(each.met for each in found)} of {len(found)} met"
    yield from map(str, found)


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.2f}" if abs(milliseconds) < 10 else f"{milliseconds:.0f}"


def put_between(path: Path, name: str, text: str) -> None:
    """Replace what lies between the marks of `name` in a page."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    page = path.read_text()
    before, rest = page.split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def headline(run: dict[str, Any]) -> str:
    """One line for the README."""
    ways = summaries(run["shapes"][MAIN_SHAPE])
    ours, peer, dcp = ways["overlap"], ways["torch-checkpointing"], ways["dcp.async"]
    durable = _ms(ours.durable_s.median)
    stall, later = _ms(ours.stall_s.median), _ms(ours.call_s.median)
    others = "; ".join(
        f"`{name}` {_ms(way.stall_s.median)} and {_ms(way.durable_s.median)} ms{note}"
        for name, way, note in (("torch_checkpointing", peer, " (not synced)"), ("dcp.async_save", dcp, ""))
    )
    return (
        f"560 LoRA tensors of a Llama-3-70B shape on 2 ranks and 2 cores: a save costs the training thread {stall} ms "
        f"({later} ms if no step follows at once) and is on disk, synced, after {durable} ms; {others}."
    )


def main() -> None:
    run = json.loads((RESULTS / "bench.json").read_text())
    print(write(run, RESULTS))
    (_DOCS / "benchmarks.svg").write_text((RESULTS / "bench.svg").read_text())
    put_between(_DOCS / "benchmarks.md", "make bench", f"```\n{render(run)}\n```")
    put_between(HOME.parent / "README.md", "benchmarks", headline(run))
    scaled = RESULTS / "scale.json"
    if scaled.exists():
        rows = json.loads(scaled.read_text())["rows"]
        put_between(_DOCS / "scale.md", "benchmarks.scale", "\n".join(["```", *scale.table(rows), "```"]))
        put_between(_DOCS / "scale.md", "big jobs", big_jobs(run, rows))


if __name__ == "__main__":
    main()
