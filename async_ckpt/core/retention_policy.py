"""Which checkpoints of a run are to be kept: what the trainer asks for and the saver applies."""

from __future__ import annotations

from typing import Literal

import msgspec

from .errors import CheckpointError

KeepBest = tuple[str, Literal["min", "max"], int]


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint stays if any rule keeps it; without a rule everything stays; the newest always stays.

    `keep_last`: the so many newest. `keep_every`: those whose step is a multiple of it. `keep_best`: by
    (metric, "min" or "max", count), the so many best. Raises CheckpointError naming the value and what is allowed.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: KeepBest | None = None

    def __post_init__(self) -> None:
        _check_count("keep_last", self.keep_last)
        _check_count("keep_every", self.keep_every)
        if self.keep_best is not None:
            _check_best(self.keep_best)

    @property
    def keeps_all(self) -> bool:
        return self.keep_last is None and self.keep_every is None and self.keep_best is None


def _check_count(name: str, value: object) -> None:
    # bool is an int to Python: keep_last=True would quietly keep one checkpoint.
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise CheckpointError(f"{name}={value!r} is not allowed: give a whole number of at least 1, or None")


def _check_best(value: object) -> None:
    match value:
        case (str(metric), "min" | "max", int(count)) if metric and count >= 1 and not isinstance(count, bool):
            return
    raise CheckpointError(
        f"keep_best={value!r} is not allowed: give (metric name, 'min' or 'max', how many), "
        "as in ('eval_loss', 'min', 2), or None"
    )
