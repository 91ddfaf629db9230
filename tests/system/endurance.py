"""A training that goes on whatever becomes of its checkpoints, and what each of those must hold."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

import async_ckpt
from tests.system.processes import until
from tests.system.training import adamw, attach, check_checkpoint, full_values, rank, reference, refusal, step, wrapped

LIMIT_S = 60.0


class Training:
    """A model that trains on, whatever becomes of its checkpoints, and what each of those must hold."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory = directory
        self.model = wrapped("fsdp2")
        self.optimizer = adamw(self.model)
        self.steps = 0
        self.committed: list[int] = []
        self.failed = 0
        self.log: list[str] = []
        self._handler = _Collecting(self.log)
        logging.getLogger("async_ckpt").addHandler(self._handler)
        self.ckpt = attach(self.model, self.optimizer, directory=directory, **{"timeout_s": LIMIT_S, **options})

    def train(self) -> None:
        step(self.model, self.optimizer)
        self.steps += 1

    def start(self, number: int, **save: Any) -> async_ckpt.SaveHandle:
        """Train, save, train on."""
        self.train()
        self.expected = reference(values=full_values(self.model))
        handle = self.ckpt.save(number, **save)
        self.train()
        return handle

    def good(self, number: int) -> None:
        """A save that must come out right."""
        self.lands(self.start(number))

    def lands(self, handle: async_ckpt.SaveHandle) -> None:
        path = handle.wait(LIMIT_S)
        self.committed.append(handle.step)
        assert path == self.directory / f"checkpoint-{handle.step}"
        if rank() == 0:
            check_checkpoint(path, self.expected, handle.step)
            assert async_ckpt.latest(self.directory) == path
        dist.barrier()

    def bad(self, number: int, *facts: str) -> str:
        """A save that must fail on every rank, for a reason with all `facts` (patterns) in the handle and the log."""
        return self.fails(self.start(number), *facts)

    def fails(self, handle: async_ckpt.SaveHandle, *facts: str) -> str:
        message = refusal(lambda: handle.wait(LIMIT_S))
        self.failed += 1
        assert handle.state == "failed"
        for fact in (rf"step {handle.step}\b", *facts):
            assert re.search(fact, message), f"{fact!r} is not in {message!r}"
            # The handle ends before the line is written.
            until(lambda fact=fact: any(re.search(fact, line) for line in self.log), f"{fact!r} in {self.log}", 10.0)
        self.train()
        dist.barrier()
        return message

    def end(self) -> None:
        """Everything is counted, the newest checkpoint loads, and there is nothing but whole checkpoints."""
        resumed = self.ckpt.restore()
        assert resumed is not None
        assert resumed.step == self.committed[-1]
        self.ckpt.close()
        logging.getLogger("async_ckpt").removeHandler(self._handler)
        stats = self.ckpt.stats()
        counted = {name: stats[name] for name in ("saves", "committed", "failed")}
        committed = len(self.committed)
        assert counted == {"saves": committed + self.failed, "committed": committed, "failed": self.failed}
        assert self.steps >= 2 * counted["saves"]
        dist.barrier()
        self.check_directory()

    def check_directory(self) -> None:
        if rank() == 0:
            found = sorted(os.listdir(self.directory))
            there = [number for number in self.committed if f"checkpoint-{number}" in found]
            assert found == sorted([*(f"checkpoint-{number}" for number in there), "latest"])
            assert os.readlink(self.directory / "latest") == f"checkpoint-{self.committed[-1]}"
        dist.barrier()


class _Collecting(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def by_rank_0(action: Callable[[], object]) -> None:
    """Everybody goes on when it is done."""
    dist.barrier()
    if rank() == 0:
        action()
    dist.barrier()


@contextmanager
def fault(begin: Callable[[], object], end: Callable[[], object]) -> Iterator[None]:
    by_rank_0(begin)
    yield
    by_rank_0(end)
