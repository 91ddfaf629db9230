"""The saver's clock for everything that runs out."""

from __future__ import annotations

from collections.abc import Callable

_STEP_S = 2.0  # the loop ticks once a second at least


class RunningClock:
    """Seconds in which this process ran: while it is stopped, or its machine is, the clock stands still.

    Else a saver that was paused for longer than a lease would, when it goes on, give up every rank whose pings are
    still waiting in its socket. It never follows the wall clock. `tick` says that the process runs.
    """

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._monotonic_s = monotonic_s
        self._ticked_s = monotonic_s()
        self._paused_s = 0.0

    def now_s(self) -> float:
        return min(self._monotonic_s(), self._ticked_s + _STEP_S) - self._paused_s

    def tick(self) -> None:
        now_s = self._monotonic_s()
        self._paused_s += max(0.0, now_s - self._ticked_s - _STEP_S)
        self._ticked_s = now_s
