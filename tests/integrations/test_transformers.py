"""The real Trainer with our mixin: what it saves, rotates, resumes and pushes means what it always meant."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import Trainer, TrainerCallback

import async_ckpt
from async_ckpt.integrations.transformers import AsyncCheckpointCallback, AsyncCheckpointMixin
from tests.integrations.trainers import KINDS, Watch, logged, make_trainer, trained_values, wrapping
from tests.system.processes import Job, run_cases, the_saver
from tests.system.training import check_checkpoint, kept, rank, reached, reference, refusal, sleep_until_killed
from tests.tiny_llama import base_model, difference, lora


def twin_files(values: Any) -> dict[str, bytes]:
    return reference(lora(lora_dropout=0.3), values)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def goes_on_as_if_it_had_not_stopped(folder: Path, kind: str) -> None:
    with wrapping(kind) as wrapped:
        whole = make_trainer(folder / "whole", **wrapped)
        whole.train()
        assert whole.checkpointer is None
        watch = Watch(stop_after=4)
        make_trainer(folder / "parts", callbacks=[watch], **wrapped).train()
        assert names(folder / "parts") == ["checkpoint-2", "checkpoint-4"]
        for step in (2, 4):
            expected = twin_files(watch.values[step])
            if rank() == 0:
                check_files(folder / "parts" / f"checkpoint-{step}", expected, step)
        again = make_trainer(folder / "parts", **wrapped)
        again.train(resume_from_checkpoint=True)
    dist.barrier()
    assert names(folder / "parts") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert [entry[0] for entry in logged(again)] == [1, 2, 3, 4, 5, 6]
    assert len({entry[1] for entry in logged(whole)}) == 6
    assert logged(again) == logged(whole)


def check_files(path: Path, expected: dict[str, bytes], step: int) -> None:
    manifest = check_checkpoint(
        path, {**expected, "trainer_state.json": (path / "trainer_state.json").read_bytes()}, step
    )
    assert manifest["metrics"]["loss"] > 0
    state = json.loads((path / "trainer_state.json").read_bytes())
    assert state["global_step"] == step
    assert [file.name for file in path.rglob("*") if file.suffix in (".pt", ".pth", ".bin")] == []


class SlowStorage(TrainerCallback):  # type: ignore[misc]
    """The saver stands still while there are steps to train: Trainer must not need it before the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seen: list[list[str]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        self._signal(signal.SIGSTOP)

    def on_save(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        self.seen.append(names(self._folder))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        if state.global_step == state.max_steps:
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if rank() == 0:
            os.kill(the_saver(self._folder), number)


def the_best_and_the_rotation_wait_for_storage(folder: Path, kind: str) -> None:
    """The highest loss counts as best here, so that it is an early one."""
    slow, watch = SlowStorage(folder), Watch()
    with wrapping(kind) as wrapped:
        trainer = make_trainer(
            folder, callbacks=[watch, slow], eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
            metric_for_best_model="loss", greater_is_better=True, save_total_limit=2, **wrapped,
        )  # fmt: skip
        trainer.checkpoint_options = {"slots": 4}
        trainer.train()
        losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
        best = max(losses, key=lambda step: losses[step])
        loaded = trained_values(trainer.model)
    dist.barrier()
    assert slow.seen == [[], [], []]
    assert losses.keys() == {2, 4, 6}
    assert trainer.state.best_model_checkpoint == str(folder / f"checkpoint-{best}")
    assert names(folder) == sorted(
        {f"checkpoint-{best}", "checkpoint-6", "checkpoint-4" if best == 6 else "checkpoint-6"}
    )
    assert all(torch.equal(loaded[name], value) for name, value in watch.values[best].items())
    assert best == 6 or any(not torch.equal(loaded[name], value) for name, value in watch.values[6].items())
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_bytes())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint


def one_is_kept(folder: Path) -> None:
    trainer = make_trainer(folder, save_total_limit=1, use_cpu=True)
    trainer.train()
    dist.barrier()
    assert names(folder) == ["checkpoint-6"]


class PushingTrainer(Trainer):  # type: ignore[misc]
    """Where Trainer would upload, notes what there is to upload."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        files = {path.relative_to(checkpoint_folder).as_posix() for path in Path(checkpoint_folder).rglob("*")}
        assert {"adapter_model.safetensors", "trainer_state.json", "async_ckpt.json"} <= files
        self.pushed = [*getattr(self, "pushed", []), Path(checkpoint_folder).name]


class AsyncPushingTrainer(AsyncCheckpointMixin, PushingTrainer):
    pass


def a_push_finds_the_whole_folder(folder: Path) -> None:
    trainer = make_trainer(folder, AsyncPushingTrainer, use_cpu=True)
    trainer.args.push_to_hub = True  # not given to Trainer's __init__, which would make the repository
    trainer.train()
    assert getattr(trainer, "pushed", []) == (["checkpoint-2", "checkpoint-4", "checkpoint-6"] if rank() == 0 else [])


def the_final_save_is_whole(folder: Path, kind: str) -> None:
    with wrapping(kind) as wrapped:
        trainer = make_trainer(folder, save_strategy="no", **wrapped)
        trainer.train()
        for final in ("final", "final", "other"):  # one of them twice: the files are replaced
            trainer.save_model(str(folder / final))
        expected = twin_files(trained_values(trainer.model))
    dist.barrier()
    assert names(folder) == []
    for final in ("final", "other"):
        files = kept(folder / final)
        if rank() == 0:
            assert difference(files["adapter_model.safetensors"], expected["adapter_model.safetensors"]) == ""
            assert files.keys() - {"training_args.bin"} == expected.keys()
        assert PeftModel.from_pretrained(base_model(), folder / final).peft_config.keys() == {"default"}


def later_checkpoints_are_in_the_way(folder: Path) -> None:
    make_trainer(folder, use_cpu=True).train()
    trainer = make_trainer(folder, use_cpu=True)
    said = refusal(trainer.train)
    assert "already holds checkpoint-6" in said
    assert "resume_from_checkpoint=True" in said
    assert trainer.state.global_step == 0
    said = refusal(
        lambda: make_trainer(folder, use_cpu=True).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    )
    assert "begins after step 4" in said


class SavesTwice(TrainerCallback):  # type: ignore[misc]
    def on_epoch_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        control.should_save = True


def from_another_folder(folder: Path) -> None:
    """Both folders have a checkpoint-4 as their newest one; saved twice at the end, which is asked for twice."""
    make_trainer(folder / "other", callbacks=[Watch(stop_after=4)], use_cpu=True, learning_rate=0.01).train()
    make_trainer(folder / "run", callbacks=[Watch(stop_after=4)], use_cpu=True).train()
    dist.barrier()
    losses = []
    for run in ("other", "run"):
        again = make_trainer(folder / "run", callbacks=[SavesTwice()], use_cpu=True, learning_rate=0.01)
        again.train(resume_from_checkpoint=str(folder / run / "checkpoint-4"))
        losses.append(logged(again)[4:])
        dist.barrier()
        if rank() == 0:
            shutil.rmtree(folder / "run" / "checkpoint-6")
        dist.barrier()
    assert len(losses[0]) == 2
    assert losses[0] != losses[1]


def goes_on_from_what_trainer_wrote(folder: Path) -> None:
    """Whoever changes over in the middle of a run loses nothing."""
    whole = make_trainer(folder / "whole", Trainer, use_cpu=True)
    whole.train()
    make_trainer(folder / "parts", Trainer, callbacks=[Watch(stop_after=4)], use_cpu=True).train()
    dist.barrier()
    assert (folder / "parts" / "checkpoint-4" / "optimizer.pt").exists()
    again = make_trainer(folder / "parts", use_cpu=True)
    again.train(resume_from_checkpoint=True)
    dist.barrier()
    assert logged(again) == logged(whole)
    assert not (folder / "parts" / "checkpoint-6" / "optimizer.pt").exists()
    assert async_ckpt.latest(folder / "parts") == folder / "parts" / "checkpoint-6"


def a_failed_save_ends_nothing(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for step in (4, 6):
        (folder / f"checkpoint-{step}").write_text("in the way")
    trainer = make_trainer(folder, use_cpu=True, eval_strategy="steps", eval_steps=4, save_steps=4,
                           load_best_model_at_end=True, metric_for_best_model="loss")  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.best_global_step in (4, 6)
    assert trainer.state.best_model_checkpoint is None


def the_callback_resumes(folder: Path) -> None:
    watch = Watch(stop_after=4)
    options: dict[str, Any] = {"use_cpu": True, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 2}
    whole = make_trainer(folder / "whole", Trainer, save_strategy="no", **options)
    whole.train()
    make_trainer(folder / "parts", Trainer, [watch, AsyncCheckpointCallback(slots=3)], **options).train()
    dist.barrier()
    assert names(folder / "parts") == ["checkpoint-4"]
    expected = twin_files(watch.values[4])
    if rank() == 0:
        check_files(folder / "parts" / "checkpoint-4", expected, 4)
    again = make_trainer(folder / "parts", Trainer, [AsyncCheckpointCallback()], **options)
    again.train(resume_from_checkpoint=True)
    assert [entry[0] for entry in logged(again)] == [1, 2, 3, 4, 5, 6]
    assert logged(again) == logged(whole)
    manifest = json.loads((folder / "parts" / "checkpoint-6" / "async_ckpt.json").read_bytes())
    assert manifest["metrics"].keys() >= {"loss", "eval_loss", "learning_rate"}


def the_callback_says_what_it_cannot_do(folder: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    for name, changes in {"load_best_model_at_end": best, "save_strategy='best'": {
        "save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 2,
    }}.items():  # fmt: skip
        trainer = make_trainer(folder, Trainer, [AsyncCheckpointCallback()], use_cpu=True, **changes)
        said = refusal(trainer.train)
        assert name in said
        assert "AsyncCheckpointMixin" in said


class StopsTheSaver(TrainerCallback):  # type: ignore[misc]
    """After the first checkpoint; the second is staged then, and waits."""

    trainer: Any

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        if state.global_step == 3:
            self.trainer.last_save.wait()
            dist.barrier()  # every rank has heard of it
            if rank() == 0:
                os.kill(the_saver(self._folder), signal.SIGSTOP)

    def on_save(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        if state.global_step == 4:
            self.trainer.last_save.staged()
            reached(self._folder, "staged")
            sleep_until_killed()


def until_it_is_killed(folder: str) -> None:
    stops = StopsTheSaver(Path(folder))
    stops.trainer = make_trainer(Path(folder), callbacks=[stops], use_cpu=True)
    stops.trainer.train()


def resumed_at_once(folder: str) -> None:
    trainer = make_trainer(Path(folder), use_cpu=True)
    reached(folder, "resuming")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.args.world_size == 2
    assert trainer._initial_global_step == 4


def test_what_was_staged_when_all_ranks_died_is_resumed_from(folder: Path) -> None:
    with Job(f"{__name__}:until_it_is_killed", 2, folder) as job:
        job.reach("staged")
        job.kill()
    assert names(folder) == ["checkpoint-2"]
    saver = the_saver(folder)
    with Job(f"{__name__}:resumed_at_once", 2, folder) as job:
        job.reach("resuming")
        os.kill(saver, signal.SIGCONT)
        job.wait()
    assert names(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


CASES: dict[str, Callable[[Path], None]] = {
    **{f"resume-{kind}": functools.partial(goes_on_as_if_it_had_not_stopped, kind=kind) for kind in KINDS},
    **{f"best-{kind}": functools.partial(the_best_and_the_rotation_wait_for_storage, kind=kind) for kind in KINDS},
    **{f"final-{kind}": functools.partial(the_final_save_is_whole, kind=kind) for kind in KINDS},
    "one-kept": one_is_kept,
    "push": a_push_finds_the_whole_folder,
    "in-the-way": later_checkpoints_are_in_the_way,
    "other-folder": from_another_folder,
    "change-over": goes_on_from_what_trainer_wrote,
    "failed-save": a_failed_save_ends_nothing,
    "callback": the_callback_resumes,
    "callback-refuses": the_callback_says_what_it_cannot_do,
}


FULL = {"best-ddp", "best-fsdp1", "final-ddp", "final-fsdp2", "one-kept"}
SCENARIOS = [pytest.param(name, marks=pytest.mark.full if name in FULL else ()) for name in CASES]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_trainer(scenario: str, selected: set[Any], folder: Path, results: dict[str, str]) -> None:
    if not results:
        results.update(run_cases(__name__, [name for name in CASES if name in selected], 2, folder))
    assert results[scenario] == ""
