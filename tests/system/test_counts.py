"""What a save costs, counted: calls, messages, copies, allocations, system calls. The counts do not grow with tensors.

A timed test would be noise on a busy machine; these counts are exact, and a loop over tensors that creeps into the save
path changes them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

import async_ckpt
from async_ckpt.core.manifest import MANIFEST_NAME
from async_ckpt.core.protocol import Ping, Pong
from tests.system.processes import environment, until

SIZES = (28, 560)
_BLOCK = 4096
_STORAGE_CALLS = "mmap,openat,mkdir,mkdirat,pwrite64,fdatasync,fsync,renameat2,rename,symlink,symlinkat,unlink,unlinkat"


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_of(tensors: int) -> Any:
    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(tensors // 2)))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[str(number) for number in range(tensors // 2)]))
    fully_shard(model)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == tensors
    return model


def stepped(model: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@dataclass
class Counts:
    """Of one save, from the call to the commit."""

    training_calls: int = 0
    staging_calls: int = 0
    copies: int = 0
    allocated_bytes: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)


def counter(add: Callable[[], None]) -> Callable[[FrameType, str, object], None]:
    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            add()

    return count


@contextmanager
def counted(ckpt: async_ckpt.Checkpointer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """Counts what happens in the training thread, in the staging thread, and between rank and saver."""
    counts = Counts()
    client, staging = ckpt._client, ckpt._staging

    def add(name: str) -> None:
        setattr(counts, name, getattr(counts, name) + 1)

    def in_staging_thread(work: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            work()
            done.set()

        staging.after_copies(run)
        assert done.wait(30)

    send, receive, copy = client._send, client._receive, torch._foreach_copy_
    post = client.post

    def posted(message: Any) -> None:
        counts.sent[type(message).__name__] += 1
        post(message)

    def received(message: Any) -> None:
        if not isinstance(message, Pong):
            counts.received[type(message).__name__] += 1
        receive(message)

    def sent(message: Any) -> None:
        if not isinstance(message, Ping):
            counts.sent[type(message).__name__] += 1
        send(message)

    def copied(*arguments: Any, **named: Any) -> Any:
        counts.copies += 1
        return copy(*arguments, **named)

    with monkeypatch.context() as patch, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        patch.setattr(client, "_send", sent)
        patch.setattr(client, "post", posted)
        patch.setattr(client, "_receive", received)
        patch.setattr(torch, "_foreach_copy_", copied)
        in_staging_thread(lambda: sys.setprofile(counter(lambda: add("staging_calls"))))
        sys.setprofile(counter(lambda: add("training_calls")))
        try:
            yield counts
        finally:
            sys.setprofile(None)
            in_staging_thread(lambda: sys.setprofile(None))
    counts.allocated_bytes = sum(max(0, event.self_cpu_memory_usage) for event in profiled.key_averages())


def count_a_save(tensors: int, folder: Path, monkeypatch: pytest.MonkeyPatch, *, adamw: bool) -> Counts:
    model = model_of(tensors)
    optimizer = stepped(model) if adamw else None
    with async_ckpt.attach(model, optimizer, directory=folder / f"run-{tensors}-{adamw}", timeout_s=60) as ckpt:
        for step in (1, 2):  # both slots' batches are prepared by their first use
            ckpt.save(step).wait()
        with counted(ckpt, monkeypatch) as counts:
            handle = ckpt.save(3)
            sys.setprofile(None)
            handle.wait()
            until(lambda: counts.received["Settled"], "the saver has answered")
    return counts


@pytest.mark.parametrize("adamw", [False, True], ids=["weights", "adamw"])
def test_a_save_of_many_tensors_is_a_save_of_few(folder: Path, monkeypatch: pytest.MonkeyPatch, adamw: bool) -> None:
    few, many = (count_a_save(tensors, folder, monkeypatch, adamw=adamw) for tensors in SIZES)
    assert few.copies == many.copies == (2 if adamw else 1), "one for everything; random numbers before save returns"
    assert few.sent == many.sent == Counter(Staged=1)
    assert few.received == many.received == Counter(Settled=1)
    assert few.training_calls == many.training_calls
    assert 0 < many.training_calls < (400 if adamw else 80)
    assert few.staging_calls == many.staging_calls
    assert 0 < many.staging_calls < 200
    if not adamw:  # the state of random generators is a new tensor each time it is asked for
        assert many.allocated_bytes == 0
    assert few.allocated_bytes == many.allocated_bytes


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_savers_system_calls_for_storage_are_the_same_for_many_tensors(folder: Path) -> None:
    few, many = (storage_calls(tensors, folder) for tensors in SIZES)
    assert few == many
    assert few["fdatasync"] == 4, "the weights, their config, the model card, the manifest"
    assert few["renameat2"] == 1
    assert few["mmap"] == 0, "a slot's image stays mapped from its first save on"


def storage_calls(tensors: int, folder: Path) -> Counter[str]:
    """System calls on files that the saver makes for one save, as strace sees them."""
    home, trace = folder / f"s{tensors}", folder / f"trace-{tensors}"
    home.mkdir(mode=0o700)
    endpoint = f"ipc://{home}/saver.sock"
    command = ["strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={_STORAGE_CALLS}",
               sys.executable, "-m", "async_ckpt_saver", "run", "--bind", endpoint, "--root", str(home)]  # fmt: skip
    saver = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    try:
        with async_ckpt.attach(model_of(tensors), directory=home / "run", saver=endpoint, timeout_s=60) as ckpt:
            for step in (1, 2, 3):
                ckpt.save(step).wait()
    finally:
        # The saver itself: strace would only let go of it.
        os.kill(int((home / "saver.sock.lock").read_text()), signal.SIGTERM)
        saver.wait(60)
    # From one checkpoint's name to the next one's: what follows a commit goes on beside the ranks' next save.
    lines = trace.read_text().splitlines()
    named = [number for number, line in enumerate(lines) if "rename" in line and re.search(r'checkpoint-\d"', line)]
    assert len(named) == 3
    calls = (re.match(r"\d+ +(\w+)\(", line) for line in lines[named[1] : named[2]])
    found = Counter(call[1] for call in calls if call is not None)
    found["mmap"] = sum("MAP_SHARED" in line for line in lines[named[1] : named[2]])  # others are memory
    # Whole blocks, then the rest of each file: all that may depend on sizes.
    files = [path.stat().st_size for path in (home / "run" / "checkpoint-3").iterdir() if path.name != MANIFEST_NAME]
    assert found.pop("pwrite64") == sum((size >= _BLOCK) + (size % _BLOCK > 0) for size in files) + 1
    return found
