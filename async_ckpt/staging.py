"""Snapshots into slots: the copy, the fence, and what the journal says of them.

A byte's way: local shard -> (one `_foreach_copy_`) -> the view at its final place in the image. There is no buffer in
between and nothing to assemble afterwards.

One snapshot's states on this rank: WRITING (the cell says so before the first byte changes) -> copied -> STAGED.
"""

from __future__ import annotations

import functools
import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
import xxhash

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.protocol import SaveRecord
from async_ckpt.core.slots import Phase

from .batch import Batch, Prepared
from .cudart import find_graphs
from .latch import Latch
from .launch import Launcher, graphs_wanted
from .lookup import Lookup, Trusted, moved
from .mapped import Part, Slot
from .sharding import Shard

log = logging.getLogger(__name__)

_SMALL_BYTES = 1 << 20

MakeRecord = Callable[[], SaveRecord | None]  # called in the staging thread: encoding must not stall the training


class Copy:
    """One snapshot on its way into a slot: `copied` when no parameter is read any more, `done` when the journal says
    that it is staged. `error`, `copy_s` and `ended_s` are valid once `done` is set."""

    def __init__(self, slot: Slot, step: int, make_record: MakeRecord, on_done: Callable[[Copy], None]) -> None:
        self.slot = slot
        self.on_done = on_done
        self.step = step
        self.make_record = make_record
        self.started_s = time.perf_counter()
        self.copy_s = 0.0
        self.ended_s = 0.0
        self.error: BaseException | None = None
        self.copied = Latch()
        self.done = Latch()
        # torch.cuda.Event, recorded on the device's side stream after the copy; and what that copy reads, which must
        # not be freed before: the allocator knows nothing of the side stream.
        self.device_events: list[tuple[torch.device, Any]] = []
        self.held: list[Batch] = []
        self.host: Batch | None = None  # what the staging thread copies; None: `views`, and the optimizer's state
        self.views: list[torch.Tensor] = []  # of the parameters, as they lay when `save` was called
        self.trusted: Trusted = []  # of them, what is only taken to lie there


class _Group:
    """Parts whose shards are looked up together, and what was prepared for them as long as nothing moves."""

    def __init__(self, indices: Sequence[int], shards: Sequence[Shard]) -> None:
        self.lookup = Lookup([shards[index] for index in indices])
        self._indices = indices
        self._prepared: dict[int, tuple[list[torch.Tensor], Prepared]] = {}

    def prepared(self, slot: Slot, views: list[torch.Tensor]) -> Prepared:
        """The copy of `views`, as `lookup` gave them, into `slot`."""
        known = self._prepared.get(slot.index)
        if known is None or known[0] is not views:
            known = views, Prepared.of([slot.targets[index] for index in self._indices], views)
            self._prepared[slot.index] = known
        return known[1]

    def forget(self) -> None:
        """Let go of the slots' memory."""
        self._prepared.clear()


class Staging:
    """Copies snapshots into slots. Guarantee: between `fence()` and the next `begin()` no copy reads a parameter.

    `overlap` True: on the CPU a worker thread copies, on CUDA a side stream, while forward and backward go on; the
    fence must then come before anything that writes to a parameter. False: `begin` returns when the copy is done.
    Buffers may change in any forward, so they are always copied before `begin` returns. `replicated` are parts that
    other ranks hold as well: their hashes go into the record, so that the saver can tell if they differ.
    """

    def __init__(
        self,
        rank: int,
        slots: Sequence[Slot],
        parts: Sequence[Part],
        *,
        overlap: bool,
        replicated: Sequence[Part] = (),
    ) -> None:
        self.slots = slots
        self._rank = rank
        self._buffers = [index for index, part in enumerate(parts) if part.shard.is_buffer]
        self._shards = [part.shard for part in parts]
        others = [index for index, part in enumerate(parts) if not part.shard.is_buffer]
        self._parameters = _Group([i for i in others if not self._shards[i].is_state], self._shards)
        self._states = _Group([i for i in others if self._shards[i].is_state], self._shards)
        self._overlap = overlap
        self._replicated = replicated
        self._in_flight: list[Copy] = []
        self.fenced_since_s: float | None = None  # the training thread waits in `fence` since then
        self._streams: dict[torch.device, Any] = {}
        self._sums: dict[int, tuple[Prepared, Prepared, Prepared]] = {}
        self._settled = False
        self._exact = False  # addresses have to be compared in `begin`: somebody moves storage and keeps the tensor
        # Made now, since making a stream later may synchronise the device.
        devices = {shard.local().device for shard in self._shards}
        for device in sorted((device for device in devices if device.type == "cuda"), key=str):
            self._streams[device] = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]
        if self._streams:
            with torch.cuda.device(next(iter(self._streams))):
                for slot in slots:
                    slot.pin()
        graphs = find_graphs() if self._streams and graphs_wanted() else None
        self._launcher = Launcher(graphs, functools.partial(_foreach_copy, non_blocking=True))
        self._tasks: queue.SimpleQueue[Copy | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="async-ckpt-staging", daemon=True)
        if self._thread_may_check():
            # Else the first save would take the time. What moves until then is prepared anew.
            self._parameters.prepared(slots[0], self._parameters.lookup.views())
        self._thread.start()

    def begin(self, slot: Slot, step: int, make_record: MakeRecord, on_done: Callable[[Copy], None]) -> Copy:
        """Start the copy of all parts into `slot`; `on_done` is called in the staging thread when it has ended.

        Raises CheckpointError if a tensor was replaced since attach; where the staging thread finds that out, it is
        the copy's `error`.
        """
        collects = gc.isenabled()
        gc.disable()  # a collection walks the whole model's objects, and the training would stand still for it
        try:
            return self._begin(Copy(slot, step, make_record, on_done))
        finally:
            if collects:
                gc.enable()

    def _begin(self, copy: Copy) -> Copy:
        slot, step = copy.slot, copy.step
        self._in_flight = [earlier for earlier in self._in_flight if not earlier.copied.is_set()]
        buffers = self._batch(slot, self._buffers)
        if self._thread_may_check():
            # As they lie now, though the thread has not begun: what moves afterwards is saved as it was.
            copy.views, others = self._parameters.lookup.views(exact=self._exact), None
            copy.trusted = [] if self._exact else self._parameters.lookup.trusted
        else:
            others = self._checked(slot, self._parameters.lookup.views())
        slot.state.mark(self._rank, Phase.WRITING, step)
        host = self._start_on_devices(copy, Prepared.of(*buffers), before_return=True)
        _foreach_copy(host, non_blocking=False)
        if others is not None:
            copy.host = self._start_on_devices(copy, others, before_return=False)
            if others.host_bytes <= _SMALL_BYTES:
                # Such as AdamW's step counts: copied now, so that the fence need not hold up the host.
                _foreach_copy(copy.host, non_blocking=False)
                copy.host = ([], [])
        self._in_flight.append(copy)
        self._tasks.put(copy)
        if not self._overlap:
            copy.copied.wait()
            for _, event in copy.device_events:
                event.synchronize()
        return copy

    def fence(self) -> float:
        """Wait until every copy in flight has read what it needs; returns the seconds that the caller waited.

        On CUDA it is the current stream that waits, not the caller.
        """
        started_s = self.fenced_since_s = time.perf_counter()
        for copy in self._in_flight:
            for device, event in copy.device_events:
                torch.cuda.current_stream(device).wait_event(event)
            if copy.host != ([], []) or self._replicated:
                copy.copied.wait()
        self._in_flight.clear()
        self.fenced_since_s = None
        return time.perf_counter() - started_s

    @property
    def copying(self) -> bool:
        """Whether a snapshot has begun since the last fence."""
        return bool(self._in_flight)

    def _batch(self, slot: Slot, indices: Sequence[int]) -> Batch:
        return [slot.targets[index] for index in indices], [self._shards[index].local() for index in indices]

    def _thread_may_check(self) -> bool:
        """Whether the staging thread may ask the shards whether they are still what they were.

        Not on CUDA, where the copy must be queued behind the caller's work, and not before the first forward of FSDP1,
        which moves its shards then.
        """
        if not self._settled:
            self._settled = not self._streams and all(shard.is_settled for shard in self._shards)
        return self._settled

    def _checked(self, slot: Slot, parameters: list[torch.Tensor]) -> Prepared:
        """What is copied into `slot`: these views of the parameters, and the optimizer's state as it is now. Raises
        CheckpointError if a parameter was replaced or converted."""
        self._parameters.lookup.check()
        self._states.lookup.check()
        states = self._states.lookup.views()
        first, second = self._parameters.prepared(slot, parameters), self._states.prepared(slot, states)
        known = self._sums.get(slot.index)
        if known is None or known[0] is not first or known[1] is not second:
            known = self._sums[slot.index] = first, second, first + second
        return known[2]

    def _start_on_devices(self, copy: Copy, prepared: Prepared, *, before_return: bool) -> Batch:
        """Queue what lies on a device; returns the rest. `before_return`: what the caller queues next waits for it."""
        for device, part in prepared.devices.items():
            event = self._copy_on_stream(device, part, None if before_return else copy.slot)
            copy.device_events.append((device, event))
            copy.held.append(part)
            if before_return:
                torch.cuda.current_stream(device).wait_event(event)
        return prepared.host

    def after_copies(self, work: Callable[[], None]) -> None:
        """Run `work` in the staging thread when every copy begun so far has ended: reports must keep their order."""
        self._tasks.put(work)

    def close(self, timeout_s: float | None = None) -> None:
        """Ends after the copies begun so far. Safe to call twice. A copy may wait for a kernel that never ends: after
        `timeout_s` it is left behind, with its slots."""
        self._tasks.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("a copy did not end within %s s and is left behind", timeout_s)
            return
        self._parameters.forget()
        self._states.forget()
        self._sums.clear()
        self._launcher.close()
        for slot in self.slots:
            slot.close()

    def _copy_on_stream(self, device: torch.device, batch: Batch, slot: Slot | None) -> Any:
        """`slot`: the one for which this batch stays the same while nothing moves."""
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._launcher.start(slot, device, batch, stream.cuda_stream)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return event

    def _work(self) -> None:
        for device in list(self._streams)[:1]:
            self._launcher.adopt_thread(device)
        while (task := self._tasks.get()) is not None:
            try:
                if isinstance(task, Copy):
                    self._serve(task)
                    self._launcher.settle()
                else:
                    task()
            except Exception:  # without this thread the next fence would wait for ever
                log.exception("a report to the saver failed")

    def _serve(self, copy: Copy) -> None:
        try:
            self._finish(copy)
        except Exception as error:  # reported through the handle; training goes on
            copy.error = error
        copy.copied.set()
        copy.ended_s = time.perf_counter()
        copy.done.set()
        copy.on_done(copy)

    def _finish(self, copy: Copy) -> None:
        if moved(copy.trusted):
            # Before or after `save` was called? Whoever does that may do it again: from now on `begin` looks.
            self._exact = True
            raise CheckpointError(
                "the storage of a sharded parameter's local tensor was exchanged since the last save (`local.data = "
                "...`, `local.set_(...)`), before save() or behind it, which nobody can tell now; the next save can"
            )
        host = self._checked(copy.slot, copy.views).host if copy.host is None else copy.host
        copy.views, copy.trusted = [], []
        _foreach_copy(host, non_blocking=False)
        if not self._replicated:  # else they are read once more below
            copy.copied.set()
        for _, event in copy.device_events:
            event.synchronize()
        copy.held.clear()
        copy.copy_s = time.perf_counter() - copy.started_s
        record = copy.make_record()
        if self._replicated:
            hashes = {part.title: _hash(part.shard.local()) for part in self._replicated}
            record = msgspec.structs.replace(record or SaveRecord(copy.step, {}, None, {}), replica_hashes=hashes)
            copy.copied.set()
        if record is not None:
            copy.slot.paths.write_record(self._rank, record)
        copy.slot.state.mark(self._rank, Phase.STAGED, copy.step, copy.copy_s)


def _hash(tensor: torch.Tensor) -> int:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(data.numpy().data)


def _foreach_copy(batch: Batch, *, non_blocking: bool) -> None:
    """One call for all tensors: it releases the GIL throughout, where a loop of `copy_` in a thread would queue for
    it once a tensor behind a busy training thread."""
    targets, sources = batch
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources, non_blocking=non_blocking)
