"""What a training loop calls, with a real saver behind it, on one rank."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from async_ckpt import opening
from async_ckpt.core.slots import Phase
from tests.system.processes import run_cases, until
from tests.system.test_busy import stopped_saver
from tests.system.training import adamw, attach, full_values, refusal, step, wrapped


def a_restore_that_another_save_overtakes_reads_the_disk(folder: Path) -> None:
    """Another rank's next save may take the slot while its image is read: what was read then is not to be trusted."""
    model = wrapped("plain")
    ckpt = attach(model, directory=folder, timeout_s=30)
    ckpt.save(1).wait()
    expected = full_values(model)
    original = opening.OpenCheckpoint.read
    reads: list[str] = []

    def taken(self: Any) -> None:
        if not reads:
            slot = ckpt._staging.slots[0]
            slot.state.mark(0, Phase.WRITING, 2)
            for target in slot.targets:
                target.fill_(777.0)
        reads.append("read")
        original(self)

    opening.OpenCheckpoint.read = taken  # type: ignore[method-assign]
    try:
        restored = ckpt.restore()
    finally:
        opening.OpenCheckpoint.read = original  # type: ignore[method-assign]
    assert restored is not None
    assert restored.source == "disk"
    assert len(reads) == 2
    assert all(torch.equal(value, expected[name]) for name, value in full_values(model).items())
    ckpt.close()


def a_restore_within_a_run_comes_from_its_own_slot(folder: Path) -> None:
    model = wrapped("plain")
    with attach(model, directory=folder, timeout_s=30) as ckpt:
        ckpt.save(1).wait()
        expected = full_values(model)
        step(model, adamw(model))
        restored = ckpt.restore()
        assert restored is not None
        assert (restored.step, restored.source) == (1, "ram")
        assert all(torch.equal(value, expected[name]) for name, value in full_values(model).items())
        earlier = ckpt.restore(1)
        assert earlier is not None
        by_path = ckpt.restore(folder / "checkpoint-1")
        assert by_path is not None
        assert by_path.path == folder / "checkpoint-1"
        assert "there is no checkpoint at" in refusal(lambda: ckpt.restore(5))


def numbers_of_numpy_are_numbers(folder: Path) -> None:
    with attach(wrapped("plain"), directory=folder, timeout_s=30) as ckpt:
        handle = ckpt.save(np.int64(1), metrics={"loss": np.float32(0.5), "n": torch.tensor(3), "nan": float("nan")})
        assert handle.wait() == folder / "checkpoint-1"
        restored = ckpt.restore()
        assert restored is not None
        assert restored.metrics == {"loss": 0.5, "n": 3, "nan": None}
        assert "whole number" in refusal(lambda: ckpt.save(1.5))


def paths_are_the_ones_that_were_given(folder: Path) -> None:
    """A home directory is expanded, and another working directory changes nothing."""
    os.environ["HOME"] = str(folder)
    with attach(wrapped("plain"), directory="~/runs", timeout_s=30) as ckpt:
        assert ckpt.save(1).wait() == folder / "runs" / "checkpoint-1"
    before = Path.cwd()
    os.chdir(folder)
    try:
        with attach(wrapped("plain"), directory="relative", timeout_s=30) as ckpt:
            os.chdir(before)
            assert ckpt.save(1).wait() == Path("relative/checkpoint-1")
            restored = ckpt.restore()
            assert restored is not None
            assert restored.path == Path("relative/checkpoint-1")
    finally:
        os.chdir(before)
    assert (folder / "relative" / "checkpoint-1" / "async_ckpt.json").exists()


def a_relative_search_path_does_not_stop_the_saver(folder: Path) -> None:
    os.environ["PYTHONPATH"] = ".:service"
    with attach(wrapped("plain"), directory=folder, timeout_s=30) as ckpt:
        ckpt.save(1).wait()


def wait_tells_of_a_failure_once(folder: Path) -> None:
    """Also of one that ended before anybody waited; but not of one whose handle has raised already."""
    model = wrapped("plain")
    with attach(model, directory=folder, timeout_s=30) as ckpt:
        lora = next(module for module in model.modules() if hasattr(module, "lora_A"))
        original = lora.lora_A["default"].weight
        with stopped_saver(folder):  # so that it cannot settle the step in between
            lora.lora_A["default"].weight = torch.nn.Parameter(original.detach().clone())
            ckpt.save(0)
            assert "no longer the tensor" in refusal(ckpt.wait)
            ckpt.wait()
            lora.lora_A["default"].weight = original
        for number in (1, 2):
            lora.lora_A["default"].weight = torch.nn.Parameter(original.detach().clone())
            handle = ckpt.save(number)
            until(functools.partial(lambda handle: handle.state == "failed", handle), "the failure")
            if number == 2:
                assert "no longer the tensor" in refusal(handle.wait)
            lora.lora_A["default"].weight = original
            if number == 1:
                assert "no longer the tensor" in refusal(ckpt.wait)
            ckpt.wait()
        assert ckpt.save(3).wait() == folder / "checkpoint-3"
        assert ckpt.stats()["failed"] == 3


def what_is_kept_is_what_was_asked_for(folder: Path) -> None:
    with attach(wrapped("plain"), directory=folder, timeout_s=30, keep_last=2, keep_best=("loss", "min", 1)) as ckpt:
        for number, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0]):
            ckpt.save(number, metrics={"loss": loss}).wait()
    expected = [f"checkpoint-{number}" for number in (1, 3, 4)]
    # The saver tidies up behind the commit, not before it says that it is one.
    until(lambda: sorted(path.name for path in folder.glob("checkpoint-*")) == expected, f"only {expected}")


def the_statistics_add_up(folder: Path) -> None:
    with attach(wrapped("plain"), directory=folder, timeout_s=30) as ckpt:
        handles = [ckpt.save(number) for number in range(1, 6)]
        ckpt.wait()
        stats = ckpt.stats()
    assert (stats["saves"], stats["committed"], stats["skipped"], stats["failed"]) == (5, 5, 0, 0)
    assert stats["committed_bytes"] == sum(handle.bytes or 0 for handle in handles) > 0
    assert stats["stall_total_s"] == pytest.approx(sum(handle.stall_s for handle in handles))
    assert stats["stall_max_s"] == max(handle.stall_s for handle in handles)


def a_forgotten_close_loses_nothing(folder: Path) -> None:
    """What runs when the interpreter ends says goodbye, and the saver commits what is staged."""
    ckpt = attach(wrapped("plain"), directory=folder, timeout_s=30)
    ckpt.save(1)
    ckpt._at_exit()
    until((folder / "checkpoint-1").exists, "the commit")


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case
    for case in (
        a_restore_that_another_save_overtakes_reads_the_disk,
        a_restore_within_a_run_comes_from_its_own_slot,
        numbers_of_numpy_are_numbers,
        paths_are_the_ones_that_were_given,
        a_relative_search_path_does_not_stop_the_saver,
        wait_tells_of_a_failure_once,
        what_is_kept_is_what_was_asked_for,
        the_statistics_add_up,
        a_forgotten_close_loses_nothing,
    )
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("case", CASES)
def test_checkpointer(results: dict[str, str], folder: Path, case: str) -> None:
    if not results:
        results.update(run_cases("tests.system.test_checkpointer", list(CASES), 1, folder))
    if results[case]:
        pytest.fail(results[case], pytrace=False)
