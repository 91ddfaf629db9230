"""What the project promises of its speed: ratios within one run, each with its verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from .catalogue import MAIN_SHAPE
from .summary import Summary, summaries

TC, DCP, OVERLAP, SYNC, BUFFERED = "torch-checkpointing", "dcp.async", "overlap", "sync", "buffered"
SAVER_BYTES = 20e6
_MANY = 1024  # ranks from which on the goals of scale are judged


@dataclass(frozen=True)
class Verdict:
    """`figure` against `goal`, which it must not exceed; `detail` says of what it is made."""

    what: str
    figure: float
    goal: float
    unit: str
    detail: str

    @property
    def met(self) -> bool:
        return self.figure <= self.goal

    def __str__(self) -> str:
        return (f"{'met   ' if self.met else 'MISSED'} {self.figure:8.3f}{self.unit:3} "
                f"(goal {self.goal:g}{self.unit})  {self.what}: {self.detail}")  # fmt: skip


def verdicts(run: dict[str, Any]) -> list[Verdict]:
    """Every goal that this run has measured. `run` is what `__main__` has collected."""
    main = run["shapes"][MAIN_SHAPE]
    ways = summaries(main)
    found = [*_stalls(ways, main), *_firsts(ways), *_durables(ways, main), *_costs(ways, main), *_restores(main)]
    if "2240" in run["shapes"]:
        more = summaries(run["shapes"]["2240"])
        found += _more_tensors(ways, more)
    return found + list(_saver(run))


def _ratio(what: str, mine: float, other: float, goal: float, names: tuple[str, str]) -> Verdict:
    detail = f"{names[0]} {_ms(mine)} / {names[1]} {_ms(other)}"
    return Verdict(what, mine / other if other else 0.0, goal, "x", detail)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _stalls(ways: dict[str, Summary], main: dict[str, Any]) -> Iterator[Verdict]:
    ours, sync, tc, dcp = ways[OVERLAP], ways[SYNC], ways[TC], ways[DCP]
    memcpy = median(main["limits"]["memcpy"])
    yield _ratio("save call", ours.call_s.median, tc.call_s.median, 0.02, ("overlap", tc.title))
    yield _ratio("save call", ours.call_s.median, dcp.call_s.median, 0.002, ("overlap", dcp.title))
    yield _ratio("call + fence wait", ours.stall_s.median, tc.stall_s.median, 0.2, ("overlap", tc.title))
    yield _ratio("call + fence wait", ours.stall_s.median, memcpy, 1.1, ("overlap", "flat memcpy"))
    yield _ratio("call + fence wait", sync.stall_s.median, memcpy, 1.1, ("sync", "flat memcpy"))


def _more_tensors(ways: dict[str, Summary], more: dict[str, Summary]) -> Iterator[Verdict]:
    few, many = ways[OVERLAP].call_s.median, more[OVERLAP].call_s.median
    yield _ratio("save call, 4x the tensors", many, few, 1.3, ("2240 tensors", "560"))
    few, many = ways[OVERLAP].stall_s.median, more[OVERLAP].stall_s.median
    yield _ratio("call + fence wait, 4x the tensors", many, few, 1.3, ("2240 tensors", "560"))


def _firsts(ways: dict[str, Summary]) -> Iterator[Verdict]:
    ours, sync, tc = ways[OVERLAP], ways[SYNC], ways[TC]
    yield _ratio("first save / a later one", sync.first_stall_s, sync.stall_s.median, 1.3, ("first", "later"))
    yield _ratio("attach + first save", ours.first_s, tc.first_s, 0.15, ("overlap", f"{tc.title} setup + first"))


def _durables(ways: dict[str, Summary], main: dict[str, Any]) -> Iterator[Verdict]:
    ours, tc = ways[OVERLAP], ways[TC]
    dd = median(main["limits"]["dd oflag=direct conv=fdatasync"])
    synced = ("overlap, fsynced", f"{tc.title}, not synced")
    yield _ratio("durable", ours.durable_s.median, tc.durable_s.median, 0.2, synced)
    yield _ratio("durable", ours.durable_s.median, ways["dcp.save"].durable_s.median, 0.2, ("overlap", "dcp.save"))
    yield _ratio("durable", ours.durable_s.median, dd, 0.8, ("overlap", "dd oflag=direct conv=fdatasync"))
    buffered = ways[BUFFERED].durable_s.median
    yield _ratio("durable, O_DIRECT refused", buffered, tc.durable_s.median, 0.5, synced)


def _costs(ways: dict[str, Summary], main: dict[str, Any]) -> Iterator[Verdict]:
    ours, tc, buffered = ways[OVERLAP], ways[TC], ways[BUFFERED]
    yield _ratio("CPU a save", ours.cpu_s.median, tc.cpu_s.median, 0.06, ("overlap", tc.title))
    yield _ratio("CPU a save, O_DIRECT refused", buffered.cpu_s.median, tc.cpu_s.median, 0.33, ("buffered", tc.title))
    if ours.extra_s is not None and tc.extra_s is not None:
        yield _ratio("extra loop time", ours.extra_s.median, tc.extra_s.median, 0.1, ("overlap", tc.title))
    yield Verdict("disk bytes / tensor bytes", ours.disk_bytes / main["bytes"], 1.001, "x", f"{ours.disk_bytes} bytes")


def _restores(main: dict[str, Any]) -> Iterator[Verdict]:
    times = {kind: median(values) for kind, values in main["restores"].items()}
    yield _ratio("restore from RAM", times["ram"], times["disk"], 0.2, ("RAM", "cold disk"))
    yield _ratio("restore from RAM", times["ram"], times["memcpy"], 1.3, ("RAM", "flat memcpy"))


def _saver(run: dict[str, Any]) -> Iterator[Verdict]:
    for name, shape in run["shapes"].items():
        uss = summaries(shape)[OVERLAP].uss_bytes
        yield Verdict(f"the saver's private memory, {name}", uss / 1e6, SAVER_BYTES / 1e6, "MB", f"{uss} bytes")
    saver = run["saver"]
    spawn_s, idle = median(saver["spawn_s"]), saver["idle_cpu"]
    yield Verdict("spawn to first answer", spawn_s, 0.1, "s", f"median of {len(saver['spawn_s'])}")
    yield Verdict("idle CPU of the saver", idle * 100, 0.1, "%", f"of one core, {saver['idle_ranks']} ranks attached")
    largest = max(run["scale"], key=lambda row: int(row["ranks"]))
    if largest["ranks"] >= _MANY:
        ranks = f"{largest['ranks']} ranks x {largest['tensors']} tensors"
        yield Verdict("registered, coverage proven", largest["registered_s"], 20.0, "s", ranks)
        loop_us, all_us = (largest[key] / largest["ranks"] * 1e6 for key in ("save_loop_cpu_s", "save_cpu_s"))
        yield Verdict(
            "CPU a rank and save, the saver's loop", loop_us, 15.0, "us", f"{ranks}; all threads {all_us:.0f} us"
        )
        smaller = min(run["scale"], key=lambda row: int(row["ranks"]))
        growth = (largest["registering_cpu_s"] / largest["ranks"]) / (smaller["registering_cpu_s"] / smaller["ranks"])
        yield Verdict("registration a rank, many / few", growth, 1.0, "x", f"{ranks} / {smaller['ranks']} ranks")
    for size in saver["memory"]:
        yield Verdict("the saver's private memory, 8 ranks", size["uss"] / 1e6, SAVER_BYTES / 1e6, "MB", size["title"])
