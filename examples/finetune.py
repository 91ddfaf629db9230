"""Fine-tune a LoRA adapter of SmolLM2-135M under FSDP2; a checkpoint costs the training milliseconds.

    python examples/prepare_model.py                                           # once: the model, offline
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # else restarted ranks may meet in a store with stale addresses
    torchrun --standalone --nproc-per-node 2 --max-restarts 1 examples/finetune.py [directory]

The adapter learns the Zen of Python by heart, which 20 steps on two CPU cores are enough for. Kill the ranks whenever
you like: torchrun starts them again, and they go on from the newest checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from prepare_model import MODEL
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import async_ckpt

STEPS, SAVE_EVERY = 20, 2


def build_model(device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)  # every rank must draw the same adapter: fully_shard keeps a slice of each rank's own
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).to(device)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def print_committed(saves: list[tuple[async_ckpt.SaveHandle, float]]) -> None:
    """A save is committed behind the training: print those that are by now, never wait for one."""
    while saves and saves[0][0].state == "committed":
        save, loss = saves.pop(0)
        times_s = {"stall": save.stall_s, "copy": save.copy_s, "write": save.write_s, "commit": save.commit_s}
        times = "  ".join(f"{name} {1000 * seconds:5.1f} ms" for name, seconds in times_s.items())
        print(f"step {save.step:3}  loss {loss:6.3f}  {times}  {save.bytes / 1e6:5.1f} MB", flush=True)


def main() -> None:
    directory = sys.argv[1] if len(sys.argv) > 1 else "runs/zen"
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    zen_of_python = subprocess.check_output([sys.executable, "-m", "this"], text=True)
    tokens = AutoTokenizer.from_pretrained(MODEL)(zen_of_python, return_tensors="pt").input_ids
    batch = tokens.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].to(device)  # each rank learns its own part

    model = build_model(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    ckpt = async_ckpt.attach(model, optimizer, directory=directory)
    resumed = ckpt.restore()  # from RAM or disk; None on a first start
    saves = []
    for step in range(resumed.step + 1 if resumed else 1, STEPS + 1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % SAVE_EVERY == 0:
            saves.append((ckpt.save(step, metrics={"loss": loss.item()}), loss.item()))
        if dist.get_rank() == 0:
            print_committed(saves)
    ckpt.close()  # waits until everything staged is committed
    if dist.get_rank() == 0:
        print_committed(saves)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
