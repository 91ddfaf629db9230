"""Raw measurements of one way, reduced to the numbers that are shown and judged."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of several measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Summary:
    """One way in one shape. Times in seconds; `cpu_s` over all processes; memory of all helpers together; `extra_s` is
    how much longer the training loop took with a save in it, `first_s` setup and the first call and its fence."""

    title: str
    durable: bool
    call_s: Spread
    stall_s: Spread
    durable_s: Spread
    cpu_s: Spread
    extra_s: Spread | None
    setup_s: float
    first_call_s: float
    first_stall_s: float
    uss_bytes: int
    pss_bytes: int
    helpers: int
    disk_bytes: int

    @property
    def first_s(self) -> float:
        return self.setup_s + self.first_stall_s


def summarise(way: dict[str, Any]) -> Summary:
    """Of `job.merged`'s entry for one way."""
    saves, first, helpers = way["saves"], way["first"], way["helpers"]
    extra = [loop["saving_s"] - loop["idle_s"] for loop in way["loops"]]
    return Summary(
        title=way["title"],
        durable=way["durable"],
        call_s=Spread.of([save["call_s"] for save in saves]),
        stall_s=Spread.of([save["call_s"] + save["fence_s"] for save in saves]),
        durable_s=Spread.of([save["durable_s"] for save in saves]),
        cpu_s=Spread.of([save["cpu_s"] for save in saves]),
        extra_s=Spread.of(extra) if extra else None,
        setup_s=way["setup_s"],
        first_call_s=first["call_s"],
        first_stall_s=first["call_s"] + first["fence_s"],
        uss_bytes=sum(helper["uss"] for helper in helpers),
        pss_bytes=sum(helper["pss"] for helper in helpers),
        helpers=len(helpers),
        disk_bytes=way["disk_bytes"],
    )


def summaries(shape: dict[str, Any]) -> dict[str, Summary]:
    return {name: summarise(way) for name, way in shape["ways"].items()}
