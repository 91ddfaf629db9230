"""SIGTERM to other people's training loops: all ranks save one step and end, and the next start goes on from there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from async_ckpt import latest
from async_ckpt.integrations.lightning import AsyncCheckpoint
from async_ckpt.integrations.transformers import AsyncCheckpointCallback
from tests.integrations.test_lightning import STRATEGIES, Module
from tests.integrations.trainers import KINDS, AsyncTrainer, Watch, data, logged, make_trainer, trained_values, wrapping
from tests.ranks import ROOT
from tests.system.processes import Job, Scenario, environment, run_together, until
from tests.system.training import ADAPTER, rank, reached, reference
from tests.tiny_llama import difference, lora

_HERE = "tests.integrations.test_preempted_trainers"
_LONG = 100_000  # steps; nobody trains them
_MORE = 3


class Ready(TrainerCallback):  # type: ignore[misc]
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        if state.global_step == 3:
            reached(self._folder, f"training-{rank()}")


def report(folder: Path, last: int, preempted: bool) -> None:
    """What this rank says of its end, which was no error."""
    (folder / f"outcome-{rank()}").write_text(json.dumps([last, preempted]))


# --- Trainer -------------------------------------------------------------------------------------------------------


BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "greater_is_better": True, "save_total_limit": 1, "save_steps": 1,
}  # fmt: skip


def wrapping_of(kind: str) -> AbstractContextManager[dict[str, Any]]:
    return wrapping(kind if kind in KINDS else "ddp")


def trainer_of(folder: Path, kind: str, callbacks: list[Any], wrapped: dict[str, Any]) -> tuple[Any, Any]:
    """The trainer, and who says whether it was preempted."""
    options = {"max_steps": _LONG, "save_steps": 50_000, **(BEST if kind == "best" else {}), **wrapped}
    if kind == "callback":
        ours = AsyncCheckpointCallback(preemption=True)
        return make_trainer(folder / "run", Trainer, [*callbacks, ours], **options), ours
    trainer = make_trainer(folder / "run", AsyncTrainer, callbacks, enable_jit_checkpoint=True, **options)
    return trainer, trainer


def train(folder: str, kind: str) -> None:
    place = Path(folder)
    before = signal.getsignal(signal.SIGTERM)
    with wrapping_of(kind) as wrapped:
        trainer, ours = trainer_of(place, kind, [Ready(place)], wrapped)
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not any(isinstance(each, JITCheckpointCallback) for each in trainer.callback_handler.callbacks)
    if kind == "best":  # the first one, since the loss falls
        assert trainer.state.best_global_step < trainer.state.global_step
        evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert evaluated == list(range(1, trainer.state.global_step))
        expected = reference(lora(lora_dropout=0.3), trained_values(trainer.model))
        if rank() == 0:
            written = (place / f"run/checkpoint-{trainer.state.global_step}" / ADAPTER).read_bytes()
            assert difference(written, expected[ADAPTER]) == ""
    report(place, trainer.state.global_step, ours.preempted)


def go_on(folder: str, kind: str, last: str) -> None:
    """And beside it a training that nobody stopped."""
    place, end = Path(folder), int(last) + _MORE
    with wrapping_of(kind) as wrapped:
        again, _ = trainer_of(place, kind, [Watch(stop_after=end)], wrapped)
        again.train(resume_from_checkpoint=True)
        assert again._initial_global_step == int(last)
        assert [entry[0] for entry in logged(again)] == list(range(1, end + 1))
        if kind == "best":
            return  # the evaluation that was left out would have drawn random numbers
        watch = Watch(stop_after=end)
        whole = make_trainer(place / "whole", Trainer, [watch], max_steps=_LONG, save_strategy="no", **wrapped)
        whole.train()
    assert logged(again) == logged(whole)


# --- Lightning -----------------------------------------------------------------------------------------------------


class Signalled(Module):
    folder: Path | None = None
    stop_after: int | None = None
    validated = 0

    def on_train_batch_end(self, *args: Any) -> None:
        if self.folder is not None and self.trainer.global_step == 3:
            reached(self.folder, f"training-{rank()}")
        if self.trainer.global_step == self.stop_after:
            self.trainer.should_stop = True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated = self.trainer.global_step


def fit(folder: Path, kind: str, callbacks: list[Any], stop_after: int | None = None) -> Signalled:
    """In the first epoch, since Lightning's own resuming is exact only there; or, for "epochs", in epochs of one step,
    at whose end a scheduler steps."""
    pl.seed_everything(3 + rank(), verbose=False)
    validating, epochs = int(kind == "validating"), kind == "epochs"
    kind = "ddp" if validating or epochs else kind
    module = Signalled(kind, "plateau" if epochs else "step")
    module.folder, module.stop_after = folder if stop_after is None else None, stop_after
    examples = data(1, 8 if epochs else 8 * _LONG // 50)
    sampler = torch.utils.data.DistributedSampler(examples, shuffle=True, seed=3)
    least = _LONG if stop_after is None else None
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=STRATEGIES[kind](), max_epochs=_LONG, callbacks=callbacks,
        min_steps=None if epochs else least, min_epochs=least if epochs else None, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, logger=False, accumulate_grad_batches=2,
        use_distributed_sampler=False, num_sanity_val_steps=1, val_check_interval=2, limit_val_batches=validating,
    )  # fmt: skip
    kind_of_loader = torch.utils.data.DataLoader if epochs else StatefulDataLoader
    loader = kind_of_loader(examples, batch_size=2, sampler=sampler)
    trainer.fit(module, loader, torch.utils.data.DataLoader(data(2, 4), batch_size=2))
    assert trainer.limit_val_batches == validating
    assert least in (None, trainer.min_epochs if epochs else trainer.min_steps)
    return module


def fit_until_told(folder: str, kind: str) -> None:
    callback = AsyncCheckpoint(Path(folder, "run"), every_n_steps=50_000, preemption=True)
    before = signal.getsignal(signal.SIGTERM)
    module = fit(Path(folder), kind, [callback])
    assert signal.getsignal(signal.SIGTERM) == before
    last = module.trainer.global_step
    assert module.validated == (last - 1 if kind == "validating" else 0)
    if kind == "epochs":  # which are counted when they are over
        state = json.loads((Path(folder) / f"run/checkpoint-{last}/training_state/training_state.json").read_bytes())
        assert state["scheduler"]["schedulers"][0]["last_epoch"] == last
    report(Path(folder), last, callback.preempted)


def fit_on(folder: str, kind: str, last: str) -> None:
    end = int(last) + _MORE
    again = fit(Path(folder), kind, [AsyncCheckpoint(Path(folder, "run"), preemption=True)], end)
    assert [step for step, _, _ in again.losses] == [step for step in range(int(last), end) for _ in range(2)]
    if kind != "validating":  # the validation that was left out would have drawn random numbers
        whole = fit(Path(folder), kind, [], end)
        assert len(whole.losses) == 2 * end
        assert again.losses == whole.losses[2 * int(last) :]


# --- how the signal comes ------------------------------------------------------------------------------------------


def launched(folder: str, target: str, kind: str) -> None:
    """One rank, as torchrun starts it."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    globals()[target](folder, kind)
    sys.stdout.flush()
    os._exit(0)


def under_torchrun(folder: Path, target: str, kind: str) -> None:
    """SIGTERM to torchrun and its ranks, as Kubernetes and service managers send it."""
    folder.mkdir(parents=True)
    script, log = folder / "train.py", folder / "torchrun.log"
    script.write_text(f"from {_HERE} import launched; launched({str(folder)!r}, {target!r}, {kind!r})")
    with log.open("wb") as output:
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)],
            env=environment(), cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        ready = [folder / f"reached-training-{each}" for each in range(2)]
        until(lambda: all(path.exists() for path in ready) or agent.poll() is not None, "ranks in training", 120.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGTERM)
        agent.wait(60)
    finally:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
    check_end(folder, log.read_text(errors="replace"))


def all_ranks_are_told(folder: Path, target: str, kind: str) -> None:
    """As torchrun's agent passes a SIGTERM on; a trainer may have a handler of its own for it."""
    with Job(f"{_HERE}:{target}", 2, folder, kind) as job:
        for each in range(2):
            job.reach(f"training-{each}")
        for pid in job.pids:
            with contextlib.suppress(ProcessLookupError):  # told by the other's saver before we came to it
                os.kill(pid, signal.SIGTERM)
        job.wait()
    check_end(folder, job.printed())


def one_rank_is_told(folder: Path, target: str, kind: str) -> None:
    with Job(f"{_HERE}:{target}", 2, folder, kind) as job:
        for each in range(2):
            job.reach(f"training-{each}")
        os.kill(job.pids[1], signal.SIGUSR1)
        job.wait()
    check_end(folder, job.printed())


def check_end(folder: Path, printed: str) -> None:
    """Every rank ended by itself, after the same step, which is the newest checkpoint."""
    stops = [int(steps) for steps in re.findall(r"all ranks stop after optimizer step (\d+)", printed)]
    outcomes = [folder / f"outcome-{each}" for each in range(2)]
    assert all(path.exists() for path in outcomes), printed[-4000:]
    said = [json.loads(path.read_text()) for path in outcomes]
    assert len(stops) == 2, printed[-4000:]
    assert said == [[stops[0], True]] * 2
    assert latest(folder / "run") == folder / "run" / f"checkpoint-{stops[0]}"


def and_on(folder: Path, target: str, kind: str) -> None:
    newest = latest(folder / "run")
    assert newest is not None
    with Job(f"{_HERE}:{target}", 2, folder, kind, newest.name.removeprefix("checkpoint-")) as job:
        job.wait()


def scenario(tell: Any, kind: str, target: str, then: str) -> Scenario:
    def run(folder: Path) -> None:
        tell(folder, target, kind)
        and_on(folder, then, kind)

    return run


SCENARIOS: dict[str, Scenario] = {
    "mixin-torchrun": scenario(under_torchrun, "ddp", "train", "go_on"),
    "mixin-fsdp2": scenario(one_rank_is_told, "fsdp2", "train", "go_on"),
    "mixin-best": scenario(one_rank_is_told, "best", "train", "go_on"),
    "callback": scenario(one_rank_is_told, "callback", "train", "go_on"),
    "lightning": scenario(all_ranks_are_told, "ddp", "fit_until_told", "fit_on"),
    "lightning-torchrun": scenario(under_torchrun, "ddp", "fit_until_told", "fit_on"),
    "lightning-validating": scenario(one_rank_is_told, "validating", "fit_until_told", "fit_on"),
    "lightning-epochs": scenario(one_rank_is_told, "epochs", "fit_until_told", "fit_on"),
    "lightning-fsdp2": scenario(one_rank_is_told, "fsdp2", "fit_until_told", "fit_on"),
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


_FULL = ("mixin-fsdp2", "lightning-torchrun", "lightning-fsdp2")


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=pytest.mark.full if name in _FULL else ()) for name in SCENARIOS]
)
def test_preempted_trainers(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        results.update(run_together({name: SCENARIOS[name] for name in SCENARIOS if name in selected}, folder, 3))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
