"""Storage that does not keep up: the saver is stopped, and `when_busy` says what becomes of the saves meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

import async_ckpt
from tests.system.processes import run_cases, the_saver
from tests.system.training import (
    adamw,
    attach,
    check_checkpoint,
    full_values,
    rank,
    reference,
    refusal,
    step,
    wrapped,
)

_TIMEOUT_S = 5.0


@contextlib.contextmanager
def stopped_saver(folder: Path) -> Iterator[None]:
    """Every rank is within the block only while the saver of `folder` is stopped."""
    dist.barrier()
    pid = the_saver(folder) if rank() == 0 else 0
    if pid:
        os.kill(pid, signal.SIGSTOP)
    dist.barrier()
    try:
        yield
        dist.barrier()
    finally:
        if pid:
            os.kill(pid, signal.SIGCONT)


def skips(folder: Path) -> None:
    """The save that finds the slot taken is skipped on all ranks; what was staged before is not lost by it."""
    model = wrapped("fsdp2")
    optimizer = adamw(model)
    ckpt = attach(model, optimizer, directory=folder, slots=1, when_busy="skip", timeout_s=60)
    ckpt.save(1).wait()
    with stopped_saver(folder):
        step(model, optimizer)
        expected = reference(values=full_values(model))
        staged = ckpt.save(2)
        staged.staged()
        step(model, optimizer)
        skipped = [ckpt.save(3), ckpt.save(4)]
        assert [handle.state for handle in skipped] == ["skipped", "skipped"]
        for handle in skipped:
            assert "slot 0 still holds step 2" in refusal(handle.wait)
            assert "skipped" in refusal(handle.staged)
        assert staged.state == "staged"
        step(model, optimizer)
    assert staged.wait() == folder / "checkpoint-2"
    step(model, optimizer)
    ckpt.save(5).wait()
    ckpt.close()
    check_stats(ckpt, saves=5, committed=3, skipped=2, failed=0)
    if rank() == 0:
        check_checkpoint(folder / "checkpoint-2", expected, 2)
        check_directory(folder, 1, 2, 5)


def waits(folder: Path) -> None:
    """The save that finds the slot taken waits for it, then fails on all ranks; what was staged before is not lost."""
    model = wrapped("fsdp1")
    optimizer = adamw(model)
    ckpt = attach(model, optimizer, directory=folder, slots=1, timeout_s=_TIMEOUT_S)
    ckpt.save(1).wait(60)
    with stopped_saver(folder):
        step(model, optimizer)
        expected = reference(values=full_values(model))
        staged = ckpt.save(2)
        staged.staged()
        step(model, optimizer)
        failed = ckpt.save(3)
        assert failed.state == "failed"
        assert failed.stall_s >= _TIMEOUT_S
        assert f"slot 0 still holds step 2 after {_TIMEOUT_S:g} s" in refusal(failed.wait)
        assert "not committed after 0.01 s" in refusal(lambda: staged.wait(0.01))
        step(model, optimizer)
    assert staged.wait(60) == folder / "checkpoint-2"
    ckpt.save(4).wait(60)
    ckpt.close()
    check_stats(ckpt, saves=4, committed=3, skipped=0, failed=1)
    assert ckpt.stats()["busy_wait_s"] >= _TIMEOUT_S
    if rank() == 0:
        check_checkpoint(folder / "checkpoint-2", expected, 2)
        check_directory(folder, 1, 2, 4)


def waits_until_the_slot_is_free(folder: Path) -> None:
    model = wrapped("ddp")
    ckpt = attach(model, directory=folder, slots=2, timeout_s=60)
    handles = [ckpt.save(number) for number in range(1, 13)]
    ckpt.wait()
    assert [handle.state for handle in handles] == ["committed"] * 12
    ckpt.close()
    check_stats(ckpt, saves=12, committed=12, skipped=0, failed=0)
    dist.barrier()
    check_directory(folder, *range(1, 13))


def check_stats(ckpt: async_ckpt.Checkpointer, **counts: int) -> None:
    stats = ckpt.stats()
    assert {name: stats[name] for name in counts} == counts
    assert stats["saves"] == stats["committed"] + stats["skipped"] + stats["failed"]
    assert 0 < stats["stall_max_s"] <= stats["stall_total_s"]
    assert stats["committed_bytes"] > 0


def check_directory(folder: Path, *numbers: int) -> None:
    assert sorted(os.listdir(folder)) == sorted([*(f"checkpoint-{number}" for number in numbers), "latest"])
    assert async_ckpt.latest(folder) == folder / f"checkpoint-{numbers[-1]}"


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case for case in (skips, waits, waits_until_the_slot_is_free)
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("case", CASES)
def test_busy(results: dict[str, str], folder: Path, case: str) -> None:
    if not results:
        results.update(run_cases("tests.system.test_busy", list(CASES), 2, folder))
    if results[case]:
        pytest.fail(results[case], pytrace=False)
