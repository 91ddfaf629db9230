"""When the saver did what for a step: for a rank that keeps a trace. Pure but for the clock."""

from __future__ import annotations

import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Literal

from async_ckpt.core.clock import clock
from async_ckpt.core.limits import MAX_SPANS
from async_ckpt.core.manifest import MANIFEST_NAME
from async_ckpt.core.protocol import Span, Traced

_REMEMBERED = 64  # steps that ranks report and that are never committed
_KINDS = {
    "mkdir": "prepare",
    "make": "prepare",
    "parts": "wait for other hosts",
    "fsync-directory": "fsync directories",
    "fsync-parent": "fsync parent",
    "latest-replace": "latest",
    "fsync-latest": "latest",
    "done": "",  # what comes now has no name
}


class StepTrace:
    """One step, from its first report to the end of retention. Called in the saver's loop and, one after the other, in
    the threads of its commit."""

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        self._first_ns = self._last_ns = now_ns()
        self._ranks: set[int] = set()
        self._spans: list[Span] = []
        self._commit_ns = 0
        self.outcome: Literal["committed", "failed"] = "failed"
        self._marks: list[tuple[str, int]] = []

    def staged(self, rank: int) -> None:
        """The rank says so, perhaps again."""
        if rank not in self._ranks and not self._commit_ns:
            self._ranks.add(rank)
            self._last_ns = self._now_ns()

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """A thread commits it within the block."""
        self._commit_ns = self._now_ns()
        try:
            yield
            self.outcome = "committed"
        finally:
            self._committed()

    def mark(self, name: str) -> None:
        """The commit's `StepHook`: a span ends here, and another begins."""
        span = _span_of(name)
        if span is not None:
            self._marks.append((span, self._now_ns()))

    def _committed(self) -> None:
        now_ns = self._now_ns()
        self._spans += [
            Span("gather", self._first_ns, self._last_ns),
            Span("queued", self._last_ns, self._commit_ns),
            Span("commit", self._commit_ns, now_ns),
        ]
        for (name, start_ns), (_, stop_ns) in zip(self._marks, [*self._marks[1:], ("", now_ns)], strict=True):
            if name == self._spans[-1].name:  # no two files have one name: it is one thing in several calls
                start_ns = self._spans.pop().start_ns
            if name:
                self._spans.append(Span(name, start_ns, stop_ns))

    @contextlib.contextmanager
    def retaining(self) -> Iterator[None]:
        started_ns = self._now_ns()
        try:
            yield
        finally:
            self._spans.append(Span("retention", started_ns, self._now_ns()))

    @property
    def spans(self) -> list[Span]:
        """What fits into one message: of a checkpoint of thousands of files some in the middle are left out."""
        if len(self._spans) <= MAX_SPANS:
            return self._spans
        return self._spans[: MAX_SPANS // 2] + self._spans[-MAX_SPANS // 2 :]


class RunTrace:
    """The steps of one run that are under way. What is done is told to rank 0 by `send`, as soon as it has been heard:
    a saver that goes on with the run of another cannot reach it before."""

    def __init__(self, send: Callable[[Traced], None]) -> None:
        self._steps: OrderedDict[int, StepTrace] = OrderedDict()
        self._send = send
        self._heard = False
        self._untold: list[Traced] = []  # at most what lay in the slots when the run was found

    def step(self, step: int) -> StepTrace:
        if step not in self._steps:
            self._steps[step] = StepTrace()
            while len(self._steps) > _REMEMBERED:
                self._steps.popitem(last=False)
        return self._steps[step]

    def heard(self) -> None:
        """Rank 0 has said something."""
        self._heard = True
        for traced in self._untold:
            self._send(traced)
        self._untold.clear()

    def done(self, step: int) -> None:
        """Nothing more will be done for it."""
        found = self.step(step)
        del self._steps[step]
        traced = Traced(step=step, outcome=found.outcome, pid=os.getpid(), clock=clock(), spans=found.spans)
        if self._heard:
            self._send(traced)
        else:
            self._untold.append(traced)


def _span_of(name: str) -> str | None:
    """The span that begins before the system call `name`; None: nothing begins there, what was under way goes on."""
    kind, _, path = name.partition(":")
    if kind == "chunk" or (kind == "fsync" and path == MANIFEST_NAME):
        return None
    return _KINDS.get(kind, f"{kind} {path}".rstrip())
