"""Ray Train, FSDP2, and checkpoints by async_ckpt: a LoRA adapter of SmolLM2-135M learns the Zen of Python by heart.

    python examples/prepare_model.py              # once: the model, offline
    python examples/ray_train.py [folder]         # again: goes on where it was

Kill a worker whenever you like: Ray starts all of them again, and they go on from the newest checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from peft import LoraConfig, get_peft_model
from prepare_model import MODEL
from ray.train import Checkpoint, CheckpointConfig, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import async_ckpt

WORKERS, STEPS, SAVE_EVERY = 2, 12, 2


def report(save: async_ckpt.SaveHandle, metrics: dict[str, Any]) -> None:
    """On every worker alike, as Ray demands. The checkpoint lies where Ray would have put it: nothing is copied."""
    try:
        checkpoint = Checkpoint.from_directory(save.wait())
    except async_ckpt.CheckpointError:
        checkpoint = None  # the save failed, on all workers; training goes on
    ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


def train(config: dict[str, Any]) -> None:
    torch.manual_seed(0)  # every rank must draw the same adapter: fully_shard keeps a slice of each rank's own
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    zen_of_python = subprocess.check_output([sys.executable, "-m", "this"], text=True)
    tokens = AutoTokenizer.from_pretrained(MODEL)(zen_of_python, return_tensors="pt").input_ids
    batch = tokens.chunk(context.get_world_size(), dim=1)[context.get_world_rank()].to(device)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).to(device)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    ckpt = async_ckpt.attach(model, optimizer, directory=config["directory"])
    resumed = ckpt.restore()  # from RAM or disk; None on a first start
    before = None  # the last save and its metrics: it is committed by the time of the next one, so nobody waits
    for step in range(resumed.step + 1 if resumed else 1, STEPS + 1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % SAVE_EVERY == 0:
            metrics = {"step": step, "loss": loss.item()}
            save = ckpt.save(step, metrics=metrics)
            if before is not None:
                report(*before)
            before = save, metrics
    if before is not None:
        report(*before)
    ckpt.close()


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/zen-ray").resolve()
    trainer = TorchTrainer(
        train,
        train_loop_config={"directory": str(run)},  # Ray's directory for this run: `storage_path/name`
        scaling_config=ScalingConfig(num_workers=WORKERS, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(
            storage_path=str(run.parent),
            name=run.name,
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=3),  # Ray removes, so attach has no keep_last
        ),
    )
    result = trainer.fit()
    print(f"newest: {async_ckpt.latest(run)}; last reported in this life: {result.metrics}")


if __name__ == "__main__":
    main()
