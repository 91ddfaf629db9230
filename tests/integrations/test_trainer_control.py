"""What `control.should_save` means to Trainer, it means with us: the same steps, with the same `trainer_state.json`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from async_ckpt.integrations.transformers import AsyncCheckpointCallback
from tests.integrations.trainers import AsyncTrainer, make_trainer
from tests.system.processes import run_cases
from tests.system.training import rank, refusal

EVENTS = ("on_step_end", "on_log", "on_evaluate", "on_epoch_end")


class Asks(TrainerCallback):  # type: ignore[misc]
    """For a save, in one event of one step, or of each."""

    def __init__(self, event: str, step: int | None = None) -> None:
        self._step = step
        setattr(self, event, self._ask)

    def _ask(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        control.should_save = control.should_save or self._step in (None, state.global_step)


class LogsNothing(Trainer):  # type: ignore[misc]
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        pass


# Six steps in two epochs of three. Most steps are logged, some evaluated, some neither.
SCHEDULES: dict[str, dict[str, Any]] = {
    "steps": {"save_steps": 2, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4},
    "epochs": {"save_strategy": "epoch", "logging_strategy": "epoch", "eval_strategy": "epoch"},
    "logged-by-step-saved-by-epoch": {"save_strategy": "epoch", "logging_steps": 3},
    "nothing": {"save_strategy": "no", "logging_strategy": "no", "max_steps": 3},
    "never-by-itself": {"save_strategy": "no", "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3},
    "first-and-last": {"save_steps": 5, "logging_first_step": True, "logging_steps": 5},
}
ASKED: dict[str, tuple[str, int | None]] = {
    "nobody": ("on_train_begin", 0),
    **{f"{event}-3": (event, 3) for event in EVENTS},
    "on_log-6": ("on_log", 6),
    "on_epoch_end": ("on_epoch_end", None),
}


def saved(folder: Path) -> dict[str, Any]:
    """Each checkpoint, and what it says was logged until then; but not how long that took."""
    found = {}
    for path in sorted(folder.glob("checkpoint-*")):
        state = json.loads((path / "trainer_state.json").read_bytes())
        history = [
            {name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second"))}
            for entry in state["log_history"]
        ]
        found[path.name] = (state["global_step"], state["epoch"], history)
    return found


def saves_what_trainer_saves(folder: Path, schedule: str, asked: list[str]) -> None:
    total = 0
    for who in asked:
        expected = None
        for kind in (Trainer, AsyncTrainer, AsyncCheckpointCallback):
            place = folder / who / kind.__name__
            callbacks: list[Any] = [Asks(*ASKED[who])]
            trainer_kind = kind
            if kind is AsyncCheckpointCallback:
                callbacks, trainer_kind = [*callbacks, kind()], Trainer
            make_trainer(place, trainer_kind, callbacks, use_cpu=True, **SCHEDULES[schedule]).train()
            dist.barrier()
            found = saved(place)
            if expected is None:
                expected = found
                assert schedule in ("nothing", "never-by-itself") or len(found) > 0
            else:
                assert [*place.rglob("optimizer.pt")] == []
                assert found == expected, f"{who}, {kind.__name__}"
        total += len(expected or ())
    assert total > 0


def what_logs_nothing_is_saved_all_the_same(folder: Path) -> None:
    make_trainer(folder, LogsNothing, [AsyncCheckpointCallback()], use_cpu=True).train()
    dist.barrier()
    assert saved(folder).keys() == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def the_last_word_is_ours(folder: Path) -> None:
    """A callback that comes after ours has Trainer save by itself: that is said."""
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(
            "async_ckpt.integrations.trainer_callback.log.warning", lambda text, *values: said.append(text % values)
        )
        callbacks = [AsyncCheckpointCallback(), Asks("on_step_end", 3)]
        make_trainer(folder, Trainer, callbacks, use_cpu=True, logging_steps=9, save_steps=5).train()
    assert len(said) == 1
    assert "saved step 3 itself" in said[0]
    assert "put AsyncCheckpointCallback last" in said[0]
    dist.barrier()
    assert (folder / "checkpoint-3" / "optimizer.pt").exists()


def trainers_own_answer_to_signals_is_refused(folder: Path) -> None:
    trainer = make_trainer(folder, Trainer, [AsyncCheckpointCallback()], use_cpu=True, enable_jit_checkpoint=True)
    assert "AsyncCheckpointCallback(preemption=True)" in refusal(trainer.train)
    if rank() == 0:
        assert not folder.exists() or list(folder.iterdir()) == []


CASES: dict[str, Callable[[Path], None]] = {
    **{
        # Asked twice for one step, before and after the epoch is logged, Trainer overwrites; we keep the first.
        schedule: functools.partial(
            saves_what_trainer_saves,
            schedule=schedule,
            asked=[who for who in ASKED if (schedule, who) != ("epochs", "on_step_end-3")],
        )
        for schedule in SCHEDULES
    },
    "logs-nothing": what_logs_nothing_is_saved_all_the_same,
    "last": the_last_word_is_ours,
    "jit": trainers_own_answer_to_signals_is_refused,
}
_QUICK = {"steps-briefly": ("steps", ["on_log-6"]), "never-by-itself-briefly": ("never-by-itself", ["on_evaluate-3"])}
CASES |= {
    name: functools.partial(saves_what_trainer_saves, schedule=schedule, asked=asked)
    for name, (schedule, asked) in _QUICK.items()
}
SCENARIOS = [pytest.param(name, marks=pytest.mark.full if name in SCHEDULES else ()) for name in CASES]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_trainer_control(scenario: str, selected: set[Any], folder: Path, results: dict[str, str]) -> None:
    if scenario not in results:
        short = [name for name in CASES if name in selected - SCHEDULES.keys()]
        chosen = [scenario] if scenario in SCHEDULES else short
        results.update(run_cases(__name__, chosen, 2, folder, timeout_s=250))
    assert results[scenario] == ""
