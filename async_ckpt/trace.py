"""What this rank did and when, and on rank 0 what the saver did, as events that Perfetto and chrome://tracing show.

    rank r    "training"   save, wait for slot, fence          one span a call; fence: the first after a save
              "slot i"     checkpoint-<step>: copy, staged     from the call of save to the outcome
    saver     "lane n"     checkpoint-<step>: gather, queued, commit (a write and an fsync a file, ...), retention

Times are CLOCK_MONOTONIC, moved to Unix time by one offset a file, in whole microseconds: cut off, never rounded, so
what lies within a span still does. Events go through a queue to a thread of their own, which alone touches the file: a
filesystem that hangs holds up nobody, and events that find the queue full are counted and left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from async_ckpt.core.clock import clock
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import checkpoint_name
from async_ckpt.core.protocol import Settled, Traced

from .trace_file import Event, Header, TraceFile, read_header

log = logging.getLogger(__name__)

TRACE_VARIABLE = "ASYNC_CKPT_TRACE"
SAVER = 1_000_000  # above any rank: Perfetto keeps the number 0 for idle processors
_TRAINING, _SLOTS = 1, 2  # numbers of the tracks of a rank; the second is slot 0's
_LANES = 1  # of those of the saver: the first
_MAX_QUEUED = 10_000
_BATCH = 256
_OPEN_S = 5.0  # how long rank 0 waits at attach for the file, and everyone at the end
_LAST_WORDS_S = 5.0  # how long rank 0 waits at the end for what the saver does after the last commit


def trace_path(given: str | os.PathLike[str] | None) -> Path | None:
    """Where to write: as `given`, else as the environment says; None for nowhere."""
    chosen = given if given is not None else os.environ.get(TRACE_VARIABLE)
    return Path(chosen).expanduser().resolve() if chosen else None


@dataclass
class _Open:
    """A save of this rank that has a slot. It ends with the copy or with the outcome, whichever comes last."""

    slot: int
    started_s: float
    copied_s: float | None = None
    settled: Settled | None = None
    settled_s: float = 0.0


@dataclass
class _Lanes:
    """Tracks on which no two spans overlap."""

    busy_until: list[int] = field(default_factory=list)

    def place(self, start: int, stop: int) -> int:
        """The number of one that is free from `start` on; it is busy until `stop` then."""
        for number, until in enumerate(self.busy_until):
            if until <= start:
                self.busy_until[number] = stop
                return number
        self.busy_until.append(stop)
        return len(self.busy_until) - 1


class Trace:
    """Events of this rank on their way to the file. Every method may be called in any thread; none blocks but `open`
    and `close`, for some seconds at most, and none raises. Times are those of `time.perf_counter`, which is
    CLOCK_MONOTONIC on Linux."""

    def __init__(self, path: Path, rank: int, job: str) -> None:
        """Rank 0 makes the file. Other ranks may record only when rank 0 has: as soon as the run has started."""
        self._path = path
        self._rank = rank
        self._clock = clock()
        self._job = job
        self._epoch_ns = self._clock.epoch_ns
        self._queue: queue.SimpleQueue[Event | Traced | None] = queue.SimpleQueue()
        self._left_out = 0
        self._failed = False
        self._opened = threading.Event()
        self._lock = threading.Lock()
        self._saves: dict[int, _Open] = {}
        self._named: set[tuple[int, int]] = set()
        self._lanes = _Lanes()
        self._traced = threading.Condition()
        self._newest_traced = -1
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="async-ckpt-trace", daemon=True)

    def open(self) -> None:
        """Begin to write; on rank 0 return when the file is there."""
        self._thread.start()
        if self._rank == 0 and not self._opened.wait(_OPEN_S):
            log.warning("%s does not answer within %g s: its trace may lack other ranks", self._path, _OPEN_S)

    # --- what a rank does ------------------------------------------------------------------------------------------

    def called(self, name: str, step: int, started_s: float) -> None:
        """The training thread was in `name` from then to now."""
        self._span(_TRAINING, name, started_s, time.perf_counter(), {"step": step})

    def not_saved(self, step: int, outcome: str, reason: str) -> None:
        self._instant(_TRAINING, outcome, time.perf_counter(), {"step": step, "reason": reason})

    def began(self, step: int, slot: int) -> None:
        """The save has its slot, and its copy begins just now."""
        with self._lock:
            self._saves[step] = _Open(slot, time.perf_counter())

    def copied(self, step: int, started_s: float, ended_s: float, error: str | None) -> None:
        """The copy has ended: staged, or failed."""
        with self._lock:
            save = self._saves.get(step)
            if save is None:
                return
            track = save.slot + _SLOTS
            self._span(track, "copy", started_s, ended_s, {"step": step} | ({"error": error} if error else {}))
            if error is None:
                self._instant(track, "staged", ended_s, {"step": step})
            save.copied_s = ended_s
            if save.settled is not None:
                self._end(step, save, max(ended_s, save.settled_s))

    def settled(self, settled: Settled) -> None:
        """The saver has told the outcome just now."""
        now_s = time.perf_counter()
        with self._lock:
            save = self._saves.get(settled.step)
            if save is None:
                return
            self._instant(save.slot + _SLOTS, "settled", now_s, {"step": settled.step, "outcome": settled.outcome})
            save.settled, save.settled_s = settled, now_s
            if save.copied_s is not None:
                self._end(settled.step, save, now_s)

    def not_begun(self, step: int) -> None:
        """Its copy could not begin: the save ends with its outcome."""
        with self._lock:
            if step in self._saves:
                self._saves[step].copied_s = self._saves[step].started_s

    def _end(self, step: int, save: _Open, stop_s: float) -> None:
        settled = save.settled
        args: dict[str, Any] = {"step": step, "outcome": settled.outcome if settled is not None else "unknown"}
        if settled is not None:
            args |= {"bytes": settled.bytes} if settled.outcome == "committed" else {"reason": settled.reason}
        self._span(save.slot + _SLOTS, checkpoint_name(step), save.started_s, stop_s, args)
        del self._saves[step]

    # --- what the saver tells rank 0 -------------------------------------------------------------------------------

    def heard(self, traced: Traced) -> None:
        self._put(traced)
        with self._traced:
            self._newest_traced = max(self._newest_traced, traced.step)
            self._traced.notify_all()

    def wait_heard(self, step: int) -> None:
        """Return when the saver has told what it did for `step`, or will not any more."""
        with self._traced:
            if not self._traced.wait_for(lambda: self._newest_traced >= step or self._failed, _LAST_WORDS_S):
                log.warning("the saver has not told what it did for step %d: the trace lacks it", step)

    # --- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Everything recorded is in the file, if it answers within some seconds. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        now_s = time.perf_counter()
        with self._lock:
            for step, save in list(self._saves.items()):
                self._end(step, save, now_s)
        self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join(_OPEN_S)
            if self._thread.is_alive():
                log.warning("%s does not answer: the trace lacks what came last", self._path)

    # --- events ----------------------------------------------------------------------------------------------------

    def _span(self, track: int, name: str, started_s: float, stopped_s: float, args: dict[str, Any]) -> None:
        start_ns, stop_ns = int(started_s * 1e9), int(stopped_s * 1e9)
        self._put({"name": name, "cat": "rank", "ph": "X", "ts": start_ns, "dur": stop_ns, "pid": self._rank + 1,
                   "tid": track, "args": args})  # fmt: skip

    def _instant(self, track: int, name: str, at_s: float, args: dict[str, Any]) -> None:
        self._put({"name": name, "cat": "rank", "ph": "i", "s": "t", "ts": int(at_s * 1e9), "pid": self._rank + 1,
                   "tid": track, "args": args})  # fmt: skip

    def _put(self, event: Event | Traced) -> None:
        """Times in it are monotonic nanoseconds, and `dur` is when a span stops: the thread knows the file's clock."""
        if self._failed:
            return
        if self._queue.qsize() >= _MAX_QUEUED:
            self._left_out += 1
            return
        self._queue.put(event)

    # --- the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        file: TraceFile | None = None
        try:
            file = self._open_file() if self._rank == 0 else None
            self._opened.set()
            while (batch := self._next_batch()) is not None:
                file = file or self._open_file()
                file.append([made for event in batch for made in self._made(event)])
        except Exception as error:
            self._failed = True
            log.warning("the trace of rank %d in %s ends here: %s", self._rank, self._path, error)
        finally:
            self._opened.set()
            with self._traced:
                self._traced.notify_all()
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def _open_file(self) -> TraceFile:
        if self._rank != 0:
            with contextlib.suppress(OSError, CheckpointError):
                header = read_header(self._path)
                # Of this job, on this host: appends of two hosts to one file would overwrite each other.
                if header.job == self._job and header.clock.name.split()[:1] == self._clock.name.split()[:1]:
                    if header.clock.name == self._clock.name:
                        self._epoch_ns = header.clock.epoch_ns
                    return TraceFile(self._path)
            self._path = self._path.with_name(f"{self._path.stem}.rank-{self._rank}{self._path.suffix}")
            log.info("rank 0 has no trace here: that of rank %d is %s", self._rank, self._path)
        header = Header(self._job, self._clock)
        first = {"name": "trace begins", "cat": "rank", "ph": "i", "s": "g", "ts": self._us(time.monotonic_ns()),
                 "pid": self._rank + 1, "tid": _TRAINING, "args": msgspec.to_builtins(header)}  # fmt: skip
        return TraceFile.create(self._path, first)

    def _next_batch(self) -> list[Event | Traced] | None:
        """What is queued, at least one; None at the end."""
        batch: list[Event | Traced] = []
        while len(batch) < _BATCH:
            try:
                event = self._queue.get_nowait() if batch else self._queue.get()
            except queue.Empty:
                return batch
            if event is None:
                if batch:
                    self._queue.put(None)
                return batch or None
            batch.append(event)
        return batch

    def _made(self, event: Event | Traced) -> Iterable[Event]:
        if self._left_out:
            left_out, self._left_out = self._left_out, 0
            yield {"name": f"{left_out} events left out", "cat": "rank", "ph": "i", "s": "p", "pid": self._rank + 1,
                   "tid": _TRAINING, "ts": self._us(time.monotonic_ns()), "args": {}}  # fmt: skip
        if isinstance(event, Traced):
            yield from self._made_of(event)
            return
        yield from self._names(event["pid"], event["tid"], f"rank {self._rank} (pid {os.getpid()})")
        if event["ph"] == "X":
            start_us = self._us(event["ts"])
            yield event | {"ts": start_us, "dur": self._us(event["dur"]) - start_us}
        else:
            yield event | {"ts": self._us(event["ts"])}

    def _made_of(self, traced: Traced) -> Iterable[Event]:
        """One step of the saver, on a track where it overlaps no other."""
        epoch_ns = self._epoch_ns if traced.clock.name == self._clock.name else traced.clock.epoch_ns
        spans = [(span.name, self._us(span.start_ns, epoch_ns), self._us(span.stop_ns, epoch_ns))
                 for span in traced.spans]  # fmt: skip
        if not spans:
            return
        start, stop = min(start for _, start, _ in spans), max(stop for _, _, stop in spans)
        track = self._lanes.place(start, stop) + _LANES
        yield from self._names(SAVER, track, f"saver (pid {traced.pid})")
        for name, begun, ended in [(checkpoint_name(traced.step), start, stop), *spans]:
            yield {"name": name, "cat": "saver", "ph": "X", "ts": begun, "dur": ended - begun, "pid": SAVER,
                   "tid": track, "args": {"step": traced.step, "outcome": traced.outcome}}  # fmt: skip

    def _names(self, process: int, track: int, title: str) -> Iterable[Event]:
        """What the viewers call them, said before their first event."""
        if (process, track) in self._named:
            return
        if not any(named == process for named, _ in self._named):
            yield {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": title}}
            yield {"name": "process_sort_index", "ph": "M", "pid": process, "tid": 0, "args": {"sort_index": process}}
        self._named.add((process, track))
        of_rank = "training" if track == _TRAINING else f"slot {track - _SLOTS}"
        name = f"lane {track}" if process == SAVER else of_rank
        yield {"name": "thread_name", "ph": "M", "pid": process, "tid": track, "args": {"name": name}}
        yield {"name": "thread_sort_index", "ph": "M", "pid": process, "tid": track, "args": {"sort_index": track}}

    def _us(self, monotonic_ns: int, epoch_ns: int | None = None) -> int:
        return (monotonic_ns + (self._epoch_ns if epoch_ns is None else epoch_ns)) // 1000
