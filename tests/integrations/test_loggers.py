"""`ckpt.stats()` in the loggers that people have, as docs/integrations/logging.md writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from tests.system.processes import run_cases, until
from tests.system.training import attach
from tests.tiny_llama import peft_model

NAMES = {"saves", "committed", "skipped", "failed", "committed_bytes", "stall_total_s", "stall_max_s", "copy_last_s",
         "write_last_s", "commit_last_s", "busy_wait_s"}  # fmt: skip


def stats_after_two_saves(folder: Path) -> dict[str, float]:
    with attach(peft_model(), directory=folder / "run") as ckpt:
        for step in (1, 2):
            ckpt.save(step).wait()
        stats = ckpt.stats()
    assert stats.keys() >= NAMES
    assert all(isinstance(value, int | float) for value in stats.values())
    return stats


def tensorboard(folder: Path) -> None:
    stats, step = stats_after_two_saves(folder), 2
    with SummaryWriter(folder / "board") as writer:
        for name, value in stats.items():
            writer.add_scalar(f"checkpoint/{name}", value, step)
    board = EventAccumulator(str(folder / "board"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {f"checkpoint/{name}" for name in stats}
    (event,) = board.Scalars("checkpoint/committed")
    assert (event.step, event.value) == (2, 2.0)


def weights_and_biases(folder: Path) -> None:
    stats, step = stats_after_two_saves(folder), 2
    with wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True)) as run:
        run.log({f"checkpoint/{name}": value for name, value in stats.items()}, step=step)
    (path,) = folder.rglob("*.wandb")
    names = [f"checkpoint/{name}".encode() for name in stats]
    until(lambda: all(name in path.read_bytes() for name in names), "W&B's own process has written the run")


CASES = {"tensorboard": tensorboard, "wandb": weights_and_biases}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", CASES)
def test_loggers(scenario: str, selected: set[Any], folder: Path, results: dict[str, str]) -> None:
    if not results:
        results.update(run_cases(__name__, [name for name in CASES if name in selected], 1, folder))
    assert results[scenario] == ""
