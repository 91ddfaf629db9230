"""Page-locking of mapped memory, so that a GPU copies into it without a bounce buffer and without stopping."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from typing import Any

import torch

from .cudart import forget_error
from .pages import Span, span_of

log = logging.getLogger(__name__)

# Of one file. What a registration costs besides its pages is some microseconds, what a page costs is a tenth of one
# and its memory: strided shards of thousands of tensors may have pages of other ranks locked between their own.
MAX_RUNS = 1024


class Pinned:
    """Runs of pages that are page-locked, by their addresses. Each that was locked is unlocked exactly once."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # ascending, in parallel with their ends
        self._stops: list[int] = []

    def register(self, base: int, runs: Sequence[Span], title: str) -> None:
        """Lock `runs` of whole pages of what is mapped at address `base`. If CUDA refuses one, a warning with `title`
        is logged; those before it stay locked, and those behind it are not tried."""
        for number, (start, stop) in enumerate(runs):
            error = int(_cudart().cudaHostRegister(base + start, stop - start, 0))
            if error:
                forget_error()
                log.warning("cannot pin %s (CUDA error %s, after %d of %d runs of pages): saves will be slower",
                            title, error, number, len(runs))  # fmt: skip
                return
            place = bisect.bisect(self._starts, base + start)
            self._starts.insert(place, base + start)
            self._stops.insert(place, base + stop)

    def holds(self, view: torch.Tensor) -> bool:
        """Whether `view` lies in one locked run, whole."""
        start, stop = span_of(view, 0)
        place = bisect.bisect(self._starts, start) - 1
        return place >= 0 and stop <= self._stops[place]

    def splits(self, view: torch.Tensor) -> bool:
        """Whether some of the pages that `view` lies in are locked but it does not lie in one locked run: CUDA refuses
        to copy such memory ("either entirely registered or not registered at all")."""
        if not self._starts:
            return False
        start, stop = span_of(view, 0)
        place = bisect.bisect_left(self._starts, stop) - 1  # the last run that begins before the end
        return start < stop and place >= 0 and self._stops[place] > start and not self.holds(view)

    def close(self) -> None:
        self._stops.clear()
        while self._starts:
            if int(_cudart().cudaHostUnregister(self._starts.pop())):
                forget_error()


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
