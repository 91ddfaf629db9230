"""Real trainers of a tiny Llama for the tests of the Trainer integration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from async_ckpt.integrations.transformers import AsyncCheckpointMixin
from tests.integrations.cpu_fsdp import fsdp_on_cpu
from tests.system.training import full_values
from tests.tiny_llama import VOCABULARY, lora, peft_model

KINDS = ("ddp", "fsdp1", "fsdp2")
EXAMPLES = 24


class AsyncTrainer(AsyncCheckpointMixin, Trainer):
    pass


def data(seed: int, examples: int = EXAMPLES) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (examples, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


@contextmanager
def wrapping(kind: str) -> Iterator[dict[str, Any]]:
    """The arguments that make Trainer wrap the model as `kind`."""
    with fsdp_on_cpu() if kind.startswith("fsdp") else nullcontext():
        if kind == "ddp":
            yield {"use_cpu": True}
        else:
            config = {"version": int(kind[-1]), "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
            if kind == "fsdp1":
                config["sync_module_states"] = False  # wants an accelerator, and the ranks' weights are equal already
            yield {"fsdp": True, "fsdp_config": config}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Six steps in two epochs on two ranks; dropout, so that resuming wrongly shows in the loss."""
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.05,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_steps": 2,
            "seed": 3,
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        }
    )


def make_trainer(folder: Path, kind: type[Trainer] = AsyncTrainer, callbacks: Any = (), **changes: Any) -> Any:
    set_seed(3)
    return kind(
        model=peft_model(lora(lora_dropout=0.3)),
        args=arguments(folder, **changes),
        train_dataset=data(1),
        eval_dataset=data(2, 4),
        callbacks=list(callbacks),
    )


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes the trained values at each step, as torch gathers them, and stops after `stop_after`."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.values: dict[int, dict[str, torch.Tensor]] = {}
        self._stop_after = stop_after

    def on_step_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        self.values[state.global_step] = trained_values(trainer["model"])
        control.should_training_stop = state.global_step == self._stop_after


def trained_values(model: Any) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): value for name, value in full_values(model).items()}


def logged(trainer: Any) -> list[tuple[int, float, float, float]]:
    """Step, loss, gradient norm and learning rate of each step of this process."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [(entry["step"], entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in entries]
