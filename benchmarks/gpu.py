"""What needs a GPU to be measured: the copy by CUDA events, pinned bandwidth, what a save allocates, what it lets wait.

Without one there is nothing to measure, and the report says so.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import async_ckpt
from async_ckpt.launch import GRAPH_VARIABLE

from .shapes import Subject

_REPETITIONS = 9
_FIRST = 6  # two slots, two saves of each tensor by tensor, and one by its graph


def gpu_section(subject: Subject, folder: Path) -> dict[str, Any] | None:
    """None without a GPU, or if the model does not lie on it. Every rank calls it."""
    tensors = subject.locals
    if not torch.cuda.is_available() or not tensors[0].is_cuda:
        return None
    nbytes = sum(tensor.nbytes for tensor in tensors)
    with _graphs(False), async_ckpt.attach(subject.model, subject.optimizer, directory=folder / "direct") as ckpt:
        ckpt.save(1).wait()  # the first save makes the caching allocator's and the driver's own structures
        direct = [_one_save(ckpt, step) for step in range(2, 2 + _REPETITIONS)]
    free_bytes = torch.cuda.mem_get_info()[0]
    with _graphs(True), async_ckpt.attach(subject.model, subject.optimizer, directory=folder / "graph") as ckpt:
        for step in range(1, 1 + _FIRST):  # then both slots have their graphs
            ckpt.save(step).wait()
        later = range(1 + _FIRST, 1 + _FIRST + _REPETITIONS)
        found = [_one_save(ckpt, step) for step in later]
        gap_s = _longest_gap(ckpt, later.stop)
        # Of the whole device: other processes' as well. The driver keeps graphs where torch does not count.
        device_bytes = free_bytes - torch.cuda.mem_get_info()[0]
    return {
        "device": torch.cuda.get_device_name(),
        "bytes": nbytes,
        "pinned_bytes_per_s": _pinned_bandwidth(nbytes),
        "direct_launch_s": [each["launch_s"] for each in direct],
        "direct_copy_s": [each["copy_s"] for each in direct],
        "direct_over_graph": _median(direct, "launch_s") / _median(found, "launch_s"),
        "launch_s": [each["launch_s"] for each in found],
        "copy_s": [each["copy_s"] for each in found],
        "device_bytes": device_bytes,
        "allocated_bytes": max(each["allocated_bytes"] for each in found),
        "stream_gap_s": gap_s,
    }


@contextlib.contextmanager
def _graphs(wanted: bool) -> Iterator[None]:
    """`attach` inside starts the copies of a save by one launch, or tensor by tensor."""
    before = os.environ.get(GRAPH_VARIABLE)
    os.environ[GRAPH_VARIABLE] = "1" if wanted else "0"
    try:
        yield
    finally:
        del os.environ[GRAPH_VARIABLE]
        if before is not None:
            os.environ[GRAPH_VARIABLE] = before


def _median(saves: list[dict[str, float]], what: str) -> float:
    return statistics.median(each[what] for each in saves)


def _one_save(ckpt: async_ckpt.Checkpointer, step: int) -> dict[str, float]:
    """The call on the host; the copy on the device, by events on both sides of it; the allocator's peak in between."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    started_s = time.perf_counter()
    handle = ckpt.save(step)
    launch_s = time.perf_counter() - started_s
    ckpt.fence()  # the current stream waits for the side stream: what is recorded now is behind the copy
    end.record()
    end.synchronize()
    allocated_bytes = torch.cuda.max_memory_allocated() - before_bytes
    handle.wait()
    return {
        "launch_s": launch_s,
        "copy_s": begin.elapsed_time(end) / 1e3,
        "allocated_bytes": float(allocated_bytes),
    }


def _pinned_bandwidth(nbytes: int) -> float:
    """The limit: one flat copy of the same bytes to pinned memory, in bytes a second."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    times_s = []
    for _ in range(_REPETITIONS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        times_s.append(begin.elapsed_time(end) / 1e3)
    return nbytes / sorted(times_s)[len(times_s) // 2]


def _longest_gap(ckpt: async_ckpt.Checkpointer, step: int) -> float:
    """How long the training's stream stood still around a save, as the profiler saw its kernels."""
    matrix = torch.rand(2048, 2048, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for number in range(20):
            matrix = matrix @ matrix
            matrix /= matrix.norm()
            if number == 10:
                handle = ckpt.save(step)
        torch.cuda.synchronize()
    handle.wait()
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "memcpy" not in event.name.lower()
    )
    gaps_us = [after[0] - before[1] for before, after in itertools.pairwise(kernels)]
    return max(gaps_us, default=0.0) / 1e6
