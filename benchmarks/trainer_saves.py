"""How long the Hugging Face Trainer stands still for a save: Trainer's own, and with the mixin.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.trainer_saves            # needs examples/prepare_model.py

SmolLM2-135M in bfloat16 with a LoRA of rank 16 on all linear layers, on CPU ranks. What is timed is everything between
the end of one step and the begin of the next in which a save is due, on the slowest rank, less what the same takes
where none is.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from async_ckpt.integrations.transformers import AsyncCheckpointMixin
from examples.prepare_model import MODEL
from tests.integrations.trainers import wrapping

STEPS, SAVE_EVERY, LENGTH = 12, 2, 32


class AsyncTrainer(AsyncCheckpointMixin, Trainer):
    pass


class Gaps(TrainerCallback):  # type: ignore[misc]
    """The time from a step's end to the next one's begin, by whether a save was due."""

    def __init__(self) -> None:
        self.between_s: dict[bool, list[float]] = {True: [], False: []}
        self._ended_s = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        dist.barrier()
        self._ended_s = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        if state.global_step > SAVE_EVERY:  # the first save also makes what later ones reuse
            self.between_s[state.global_step % SAVE_EVERY == 0].append(time.perf_counter() - self._ended_s)


def measure(kind: type[Trainer], wrapper: str) -> tuple[float, float, int]:
    """Median and worst seconds of a save, and the bytes of a checkpoint."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    windows = torch.randint(1000, (64, LENGTH))
    folder = [tempfile.mkdtemp(prefix="trainer-saves-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    gaps = Gaps()
    with wrapping(wrapper) as wrapped:
        arguments = TrainingArguments(
            folder[0], max_steps=STEPS, save_steps=SAVE_EVERY, save_total_limit=2, per_device_train_batch_size=1,
            logging_strategy="no", report_to="none", disable_tqdm=True, **wrapped,
        )  # fmt: skip
        examples = [{"input_ids": window, "labels": window} for window in windows]
        trainer = kind(
            model, arguments, train_dataset=examples, data_collator=default_data_collator, callbacks=[gaps]
        )  # fmt: skip
        trainer.train()
    saves = [due - statistics.median(gaps.between_s[False]) for due in gaps.between_s[True]]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, saves)
    slowest = [max(each) for each in zip(*everywhere, strict=True)]
    files = [path for path in Path(folder[0], f"checkpoint-{STEPS}").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    return statistics.median(slowest), max(slowest), size


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for wrapper in ("ddp", "fsdp2"):
        for kind in (Trainer, AsyncTrainer):
            median_s, worst_s, size = measure(kind, wrapper)
            if dist.get_rank() == 0:
                print(f"{wrapper:6} {kind.__name__:13} median {1e3 * median_s:8.1f} ms  worst {1e3 * worst_s:8.1f} ms  "
                      f"{size / 1e6:6.1f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
