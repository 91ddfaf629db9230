"""A real Lightning Trainer with our callback: stopped and started again, it goes on where it was."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from async_ckpt import latest
from async_ckpt.integrations.lightning import AsyncCheckpoint
from tests.integrations.trainers import data
from tests.system.processes import run_cases
from tests.system.training import check_checkpoint, full_values, rank, reference, refusal
from tests.tiny_llama import lora, peft_model


class CpuFSDPStrategy(FSDPStrategy):
    """Lightning refuses FSDPStrategy itself, by its name, without a GPU; FSDP1 must be told that it is on the CPU."""

    def _setup_model(self, model: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self), "root_device", SimpleNamespace(index=torch.device("cpu"), type="cpu"))
            return super()._setup_model(model)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp1": lambda: CpuFSDPStrategy(auto_wrap_policy={LlamaDecoderLayer}, process_group_backend="gloo"),
    "fsdp2": lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"),
}


class Module(pl.LightningModule):
    def __init__(self, kind: str, interval: str) -> None:
        super().__init__()
        self.kind, self.interval = kind, interval
        self.model = peft_model(lora(lora_dropout=0.3))
        self.losses: list[tuple[int, float, float]] = []
        self.values: dict[int, Any] = {}

    def configure_model(self) -> None:
        if self.kind == "fsdp2":
            for layer in self.model.get_base_model().model.layers:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.losses.append((self.trainer.global_step, loss.item(), rate))
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        values = full_values(self.trainer.strategy.model if self.kind == "fsdp1" else self.model)
        # Of a unit that holds frozen parameters as well, FSDP1 says that all are trained.
        self.values[self.trainer.global_step] = {
            name[name.index("base_model.") :]: value for name, value in values.items() if "lora" in name
        }

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)
        if self.interval == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return [optimizer], [{"scheduler": plateau, "monitor": "loss"}]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": self.interval}]


def loader(stateful: bool) -> Any:
    kind = StatefulDataLoader if stateful else torch.utils.data.DataLoader
    sampler = torch.utils.data.DistributedSampler(data(1), shuffle=True, seed=3)
    return kind(data(1), batch_size=2, sampler=sampler)


def fit(kind: str, callback: Any, max_steps: int, *, stateful: bool = False, interval: str = "") -> Module:
    """Six steps are two epochs; every second batch is a step."""
    pl.seed_everything(3 + rank(), verbose=False)
    module = Module(kind, interval or ("step" if stateful else "epoch"))
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=STRATEGIES[kind](), max_steps=max_steps, callbacks=[callback],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, logger=False,
        accumulate_grad_batches=2, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, loader(stateful))
    assert trainer.global_step == max_steps
    return module


def goes_on(folder: Path, kind: str, stop: int, stateful: bool) -> None:
    whole = fit(kind, AsyncCheckpoint(folder / "whole", every_n_steps=stop), 6, stateful=stateful)
    part = fit(kind, AsyncCheckpoint(folder / "parts", every_n_steps=stop), stop, stateful=stateful)
    callback = AsyncCheckpoint(folder / "parts", every_n_steps=stop)
    again = fit(kind, callback, 6, stateful=stateful)
    assert callback.checkpointer is None
    assert len(whole.losses) == 12
    assert [step for step, _, _ in again.losses] == [step for step, _, _ in whole.losses][2 * stop :]
    assert part.losses + again.losses == whole.losses
    dist.barrier()
    assert latest(folder / "parts") == folder / "parts" / "checkpoint-6"
    expected = reference(lora(lora_dropout=0.3), again.values[6])
    if rank() == 0:
        manifest = check_checkpoint(folder / "parts" / "checkpoint-6", expected, 6)
        assert manifest["metrics"]["loss"] > 0


def a_checkpoint_in_the_way(folder: Path) -> None:
    fit("ddp", AsyncCheckpoint(folder, every_n_steps=None), 3)
    assert latest(folder) == folder / "checkpoint-3"
    said = refusal(lambda: fit("ddp", AsyncCheckpoint(folder, resume=False), 6))
    assert "holds checkpoint-3" in said


def every_epoch_when_it_is_over(folder: Path) -> None:
    """With its own weights, and the learning rate of the next one."""
    module = fit("ddp", AsyncCheckpoint(folder, every_n_steps=None, every_epoch=True), 6)
    dist.barrier()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    expected = reference(lora(lora_dropout=0.3), module.values[3])
    if rank() == 0:
        check_checkpoint(folder / "checkpoint-3", expected, 3)
        state = json.loads((folder / "checkpoint-3" / "training_state" / "training_state.json").read_bytes())
        assert state["scheduler"]["schedulers"][0]["_last_lr"] == [0.025]


def what_steps_after_the_last_batch_is_waited_for(folder: Path) -> None:
    """Lightning asks this scheduler after the hooks of the epoch's last batch, unlike the others."""
    fit("ddp", AsyncCheckpoint(folder, every_n_steps=3), 6, interval="plateau")
    if rank() == 0:
        state = json.loads((folder / "checkpoint-3" / "training_state" / "training_state.json").read_bytes())
        assert state["scheduler"]["schedulers"][0]["last_epoch"] == 1


CASES: dict[str, Callable[[Path], None]] = {
    "ddp-epoch": functools.partial(goes_on, kind="ddp", stop=3, stateful=False),
    "ddp-middle": functools.partial(goes_on, kind="ddp", stop=2, stateful=True),
    "fsdp1": functools.partial(goes_on, kind="fsdp1", stop=3, stateful=False),
    "fsdp2": functools.partial(goes_on, kind="fsdp2", stop=2, stateful=True),
    "every-epoch": every_epoch_when_it_is_over,
    "plateau": what_steps_after_the_last_batch_is_waited_for,
    "in-the-way": a_checkpoint_in_the_way,
}


FULL = {"ddp-middle", "every-epoch", "fsdp1"}
SCENARIOS = [pytest.param(name, marks=pytest.mark.full if name in FULL else ()) for name in CASES]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_lightning(scenario: str, selected: set[Any], folder: Path, results: dict[str, str]) -> None:
    if not results:
        results.update(run_cases(__name__, [name for name in CASES if name in selected], 2, folder))
    assert results[scenario] == ""
