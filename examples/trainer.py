"""The Hugging Face Trainer, saving through async_ckpt: SmolLM2-135M learns the Zen of Python by heart.

    python examples/prepare_model.py                                      # once: the model, offline
    torchrun --standalone --nproc-per-node 2 examples/trainer.py [folder]   # again: goes on where it was

Kill it whenever you like, and start it again.
"""

from __future__ import annotations

import subprocess
import sys

import torch
from peft import LoraConfig, get_peft_model
from prepare_model import MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import async_ckpt
from async_ckpt.integrations.transformers import AsyncCheckpointMixin

STEPS, SAVE_EVERY, LENGTH = 12, 4, 32


class AsyncTrainer(AsyncCheckpointMixin, Trainer):
    pass


def main() -> None:
    directory = sys.argv[1] if len(sys.argv) > 1 else "runs/zen-trainer"
    arguments = TrainingArguments(
        directory,
        max_steps=STEPS,
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=SAVE_EVERY,
        use_cpu=not torch.cuda.is_available(),
        # fsdp=True on GPUs: nothing else changes
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    zen_of_python = subprocess.check_output([sys.executable, "-m", "this"], text=True)
    windows = tokenizer(zen_of_python, return_tensors="pt").input_ids[0].split(LENGTH)[:-1]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    trainer = AsyncTrainer(
        model,
        arguments,
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=async_ckpt.latest(directory) is not None)


if __name__ == "__main__":
    main()
