"""Jobs that were refused while some of their ranks were still on their way: those hear the same reason as they come."""

from __future__ import annotations

import msgspec

from async_ckpt.core.limits import MAX_REMEMBERED_REFUSALS
from async_ckpt.core.processes import now_ticks
from async_ckpt.core.protocol import Process

from .hosts.shares import host_of

_REMEMBER_S = 20.0  # how long a refused job's late ranks are waited for


class _RefusedJob(msgspec.Struct):
    reason: str
    since_s: float
    since_ticks: int
    untold: int


class Refusals:
    """Those of one directory. False when there are none."""

    def __init__(self) -> None:
        self._jobs: dict[str, _RefusedJob] = {}

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def remember(self, job: str, reason: str, untold: int, now_s: float, *, replace: bool = True) -> None:
        """`untold` ranks of `job` have not heard of it. Without `replace` the first reason stands."""
        if untold > 0 and (replace or job not in self._jobs):
            self._jobs[job] = _RefusedJob(reason, now_s, now_ticks(), untold)
        while len(self._jobs) > MAX_REMEMBERED_REFUSALS:
            del self._jobs[next(iter(self._jobs))]

    def tell(self, job: str, process: Process | None = None) -> str | None:
        """The reason for one more rank of `job`, None if it was not refused. A process that started after the refusal
        belongs to a new launch of the same name, which begins afresh; of another host's nobody can say."""
        refused = self._jobs.get(job)
        if refused is None:
            return None
        if process is not None and host_of(process) is None and process.start_ticks > refused.since_ticks:
            del self._jobs[job]
            return None
        refused.untold -= 1
        if refused.untold <= 0:
            del self._jobs[job]
        return refused.reason

    def expire(self, now_s: float) -> None:
        self._jobs = {job: each for job, each in self._jobs.items() if now_s - each.since_s <= _REMEMBER_S}
