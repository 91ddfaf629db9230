"""Slots as this rank sees them: mapped, pinned, with a view for every part it owns; the copy; the fence.

A byte's way: local shard -> (one `_foreach_copy_`) -> the view at its final place in the image. There is no buffer in
between and nothing to assemble afterwards.

One snapshot's states on this rank: WRITING (the cell says so before the first byte changes) -> copied -> STAGED.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from async_ckpt.core.layout import Extent
from async_ckpt.core.protocol import SaveRecord
from async_ckpt.core.region import Region
from async_ckpt.core.slots import Phase, SlotPaths, StateFile

from .sharding import Shard

log = logging.getLogger(__name__)

_SMALL_BYTES = 1 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it before Python 3.14

MakeRecord = Callable[[], SaveRecord | None]  # called in the staging thread: encoding must not stall the training


@dataclass(frozen=True)
class Part:
    """One owned piece: `shard`'s local tensor goes to `extent` of image file `path`."""

    path: str
    extent: Extent
    shard: Shard

    @property
    def title(self) -> str:
        region = self.shard.region
        whole = region.numel == self.extent.spec.numel
        return f"tensor {self.extent.spec.name!r}" + ("" if whole else f" at {region.offsets}+{region.sizes}")


def image_view(image: torch.Tensor, extent: Extent, dtype: torch.dtype, region: Region) -> torch.Tensor:
    """The part `region` of a tensor inside a file's bytes `image` (uint8), with shape `region.sizes`. No copy."""
    whole = image[extent.start : extent.stop].view(dtype)
    if region.flat:
        return whole[region.offsets[0] : region.offsets[0] + region.sizes[0]]
    whole = whole.view(extent.spec.shape)
    for dim, (offset, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole


class Slot:
    """One slot, mapped into this process. `targets` lie in the order of the parts."""

    def __init__(self, run: Path, index: int, parts: Sequence[Part]) -> None:
        self.index = index
        self.paths = SlotPaths(run, index)
        self.state = StateFile(self.paths.state)
        self._maps: dict[str, mmap.mmap] = {}
        self._images: dict[str, torch.Tensor] = {}
        self._pinned: list[int] = []
        for path in {part.path for part in parts}:
            with (self.paths.image / path).open("r+b") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0)
            self._images[path] = torch.frombuffer(self._maps[path], dtype=torch.uint8)
        self.targets = [
            image_view(self._images[part.path], part.extent, part.shard.dtype, part.shard.region) for part in parts
        ]
        self._populate(parts)

    def _populate(self, parts: Sequence[Part]) -> None:
        """Map our own pages now: the first copy would otherwise take a page fault for each of them."""
        page = mmap.PAGESIZE
        for path, mapped in self._maps.items():
            base = self._images[path].data_ptr()
            spans = sorted(_span(target, base) for part, target in zip(parts, self.targets, strict=True)
                           if part.path == path and target.numel())  # fmt: skip
            start = stop = 0
            for begin, end in [*spans, (len(mapped) + 2 * page, 0)]:
                if begin > stop + page:
                    first = start // page * page
                    try:
                        mapped.madvise(_MADV_POPULATE_WRITE, first, stop - first)
                    except OSError as error:
                        log.debug("the first copy will be slower, pages cannot be mapped ahead: %s", error)
                        return
                    start = begin
                stop = max(stop, end)

    def pin(self) -> None:
        """Page-lock the image, so that the GPU copies into it without a bounce buffer and without stopping."""
        for path, image in self._images.items():
            result = _cudart().cudaHostRegister(image.data_ptr(), image.numel(), 0)
            if int(result) != 0:
                _forget_cuda_error()
                log.warning("cannot pin %s (CUDA error %s): saves will be slower", path, int(result))
            else:
                self._pinned.append(image.data_ptr())

    def close(self) -> None:
        for pointer in self._pinned:
            _cudart().cudaHostUnregister(pointer)
        self._pinned.clear()
        # The views keep the mapping alive until the last of them is gone; the kernel frees it then.
        self.targets.clear()
        self._images.clear()
        self._maps.clear()
        self.state.close()


class Copy:
    """One snapshot on its way into a slot: `copied` when no parameter is read any more, `done` when the journal says
    that it is staged. `error` and `copy_s` are valid once `done` is set."""

    def __init__(self, slot: Slot, step: int, make_record: MakeRecord, on_done: Callable[[Copy], None]) -> None:
        self.slot = slot
        self.on_done = on_done
        self.step = step
        self.make_record = make_record
        self.started_s = time.perf_counter()
        self.copy_s = 0.0
        self.error: BaseException | None = None
        self.copied = threading.Event()
        self.done = threading.Event()
        # torch.cuda.Event, recorded on the device's side stream after the copy; and what that copy reads, which must
        # not be freed before: the allocator knows nothing of the side stream.
        self.device_events: list[tuple[torch.device, Any]] = []
        self.held: list[Batch] = []
        self.host: Batch | None = None  # what the staging thread copies; None: it finds that out itself


Batch = tuple[list[torch.Tensor], list[torch.Tensor]]  # targets and sources, in parallel


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
        self._others = [index for index, part in enumerate(parts) if not part.shard.is_buffer]
        self._shards = [part.shard for part in parts]
        self._overlap = overlap
        self._replicated = replicated
        self._in_flight: list[Copy] = []
        self._streams: dict[torch.device, Any] = {}
        self._settled = False
        # Made now, since making a stream later may synchronise the device.
        devices = {shard.local().device for shard in self._shards}
        for device in sorted((device for device in devices if device.type == "cuda"), key=str):
            self._streams[device] = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]
        if self._streams:
            with torch.cuda.device(next(iter(self._streams))):
                for slot in slots:
                    slot.pin()
        self._tasks: queue.SimpleQueue[Copy | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="async-ckpt-staging", daemon=True)
        self._thread.start()

    def begin(self, slot: Slot, step: int, make_record: MakeRecord, on_done: Callable[[Copy], None]) -> Copy:
        """Start the copy of all parts into `slot`; `on_done` is called in the staging thread when it has ended.

        Raises CheckpointError if a tensor was replaced since attach; where the staging thread finds that out, it is
        the copy's `error`.
        """
        copy = Copy(slot, step, make_record, on_done)
        self._in_flight = [earlier for earlier in self._in_flight if not earlier.copied.is_set()]
        buffers = self._batch(slot, self._buffers)
        others = None if self._thread_may_look() else self._batch(slot, self._others)
        slot.state.mark(self._rank, Phase.WRITING, step)
        host = self._start_on_devices(copy, buffers, before_return=True)
        _foreach_copy(host, non_blocking=False)
        if others is not None:
            copy.host = self._start_on_devices(copy, others, before_return=False)
            if sum(source.nbytes for source in copy.host[1]) <= _SMALL_BYTES:
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
        started_s = time.perf_counter()
        for copy in self._in_flight:
            for device, event in copy.device_events:
                torch.cuda.current_stream(device).wait_event(event)
            if copy.host != ([], []) or self._replicated:
                copy.copied.wait()
        self._in_flight.clear()
        return time.perf_counter() - started_s

    def _batch(self, slot: Slot, indices: Sequence[int]) -> Batch:
        return [slot.targets[index] for index in indices], [self._shards[index].local() for index in indices]

    def _thread_may_look(self) -> bool:
        """Whether the staging thread may ask the shards where they lie: a call a tensor that `save` need not pay for.

        Not on CUDA, where the copy must be queued behind the caller's work, and not before the first forward of FSDP1,
        which moves its shards then.
        """
        if not self._settled:
            self._settled = not self._streams and all(shard.is_settled for shard in self._shards)
        return self._settled

    def _start_on_devices(self, copy: Copy, batch: Batch, *, before_return: bool) -> Batch:
        """Queue what lies on a device; returns the rest. `before_return`: what the caller queues next waits for it."""
        if not self._streams:
            return batch
        host: Batch = ([], [])
        devices: dict[torch.device, Batch] = {}
        for target, source in zip(*batch, strict=True):
            on = devices.setdefault(source.device, ([], [])) if source.is_cuda else host
            on[0].append(target)
            on[1].append(source)
        for device, part in devices.items():
            event = self._copy_on_stream(device, part)
            copy.device_events.append((device, event))
            copy.held.append(part)
            if before_return:
                torch.cuda.current_stream(device).wait_event(event)
        return host

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
        for slot in self.slots:
            slot.close()

    def _copy_on_stream(self, device: torch.device, batch: Batch) -> Any:
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            _foreach_copy(batch, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return event

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if isinstance(task, Copy):
                    self._serve(task)
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
        copy.done.set()
        copy.on_done(copy)

    def _finish(self, copy: Copy) -> None:
        host = self._batch(copy.slot, self._others) if copy.host is None else copy.host
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


def _span(view: torch.Tensor, base: int) -> tuple[int, int]:
    """The bytes [start, stop) from address `base` within which `view` lies: a rank's own part of a large tensor."""
    start = view.data_ptr() - base
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return start, start + (last + 1) * view.element_size()


def _forget_cuda_error() -> None:
    """CUDA keeps the last error, and torch would raise it after its next kernel, far from here."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libcudart" in line:
            ctypes.CDLL(line.split(maxsplit=5)[5]).cudaGetLastError()
            return


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _foreach_copy(batch: Batch, *, non_blocking: bool) -> None:
    """One call for all tensors: it releases the GIL throughout, where a loop of `copy_` in a thread would queue for
    it once a tensor behind a busy training thread."""
    targets, sources = batch
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources, non_blocking=non_blocking)
