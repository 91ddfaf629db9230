"""What accelerator.prepare returns goes into attach as it is; what it wraps does as well."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin

from tests.integrations.cpu_fsdp import fsdp_on_cpu
from tests.integrations.trainers import KINDS, data, trained_values
from tests.system.processes import run_cases
from tests.system.training import attach, check_checkpoint, everywhere, rank, reference
from tests.tiny_llama import no_collectives, peft_model

STATE = "training_state/training_state.json"


class Training:
    """A loop as accelerate's pages have it, with every object prepared."""

    def __init__(self, kind: str, accumulate: int = 1) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = None
        if kind != "ddp":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=int(kind[-1]), auto_wrap_policy="transformer_based_wrap", use_orig_params=True,
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False,
                sync_module_states=False,
            )  # fmt: skip
        self.accelerator = Accelerator(cpu=kind == "ddp", fsdp_plugin=plugin, gradient_accumulation_steps=accumulate)
        model = peft_model()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        loader = torch.utils.data.DataLoader(data(1, 16), batch_size=2)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )
        assert type(self.optimizer).__name__ == "AcceleratedOptimizer"
        assert type(self.scheduler).__name__ == "AcceleratedScheduler"

    def parts(self, prepared: bool) -> dict[str, Any]:
        if prepared:
            return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.accelerator.scaler}
        return {"optimizer": self.optimizer.optimizer, "scheduler": self.scheduler.scheduler}

    def losses(self) -> list[tuple[float, float]]:
        found = []
        for batch in self.loader:
            loss = self.model(**batch).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            found.append((loss.item(), self.scheduler.get_last_lr()[0]))
        return found


def goes_on_bit_by_bit(folder: Path, kind: str) -> None:
    with nullcontext() if kind == "ddp" else fsdp_on_cpu():
        run = Training(kind)
        run.losses()
        expected = reference(values=trained_values(run.model))
        for name, prepared in (("prepared", True), ("inner", False)):
            with no_collectives(), attach(run.model, **run.parts(prepared), directory=folder / name) as ckpt:
                ckpt.save(4)
        if rank() == 0:
            check_checkpoint(folder / "prepared" / "checkpoint-4", expected, 4)
        states = [(folder / name / "checkpoint-4" / STATE).read_bytes() for name in ("prepared", "inner")]
        assert states[0] == states[1]
        assert b'"scheduler"' in states[0]
        then = run.losses()
        for prepared in (True, False):
            again = Training(kind)
            with attach(again.model, **again.parts(not prepared), directory=folder / "prepared") as ckpt:
                restored = ckpt.restore()
                assert restored is not None
                assert restored.step == 4
                assert again.losses() == then
        AcceleratorState._reset_state(reset_partial_state=True)


def a_notice_ends_the_loop(folder: Path) -> None:
    """With gradients that are accumulated over two batches, of which the page says how to leave."""
    run = Training("ddp", accumulate=2)
    with attach(run.model, **run.parts(True), directory=folder, preemption=True) as ckpt:
        for number in range(100_000):
            with run.accelerator.accumulate(run.model):
                run.accelerator.backward(run.model(**next(iter(run.loader))).loss)
                run.optimizer.step()
                run.scheduler.step()
                run.optimizer.zero_grad()
            if (rank(), number) == (1, 3):
                os.kill(os.getpid(), signal.SIGTERM)
            if run.accelerator.sync_gradients and ckpt.preempted:
                ckpt.save(number)
                break
    stopped = everywhere(number)
    assert stopped[0] == stopped[1] > 3
    assert stopped[0] % 2 == 1
    expected = reference(values=trained_values(run.model))
    if rank() == 0:
        check_checkpoint(folder / f"checkpoint-{number}", expected, number)
        assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-{number}", "latest"]
    AcceleratorState._reset_state(reset_partial_state=True)


CASES: dict[str, Callable[[Path], None]] = {
    **{kind: functools.partial(goes_on_bit_by_bit, kind=kind) for kind in KINDS},
    "notice": a_notice_ends_the_loop,
}


FULL = {"ddp"}
SCENARIOS = [pytest.param(name, marks=pytest.mark.full if name in FULL else ()) for name in CASES]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_accelerate(scenario: str, selected: set[Any], folder: Path, results: dict[str, str]) -> None:
    if not results:
        results.update(run_cases(__name__, [name for name in CASES if name in selected], 2, folder))
    assert results[scenario] == ""
