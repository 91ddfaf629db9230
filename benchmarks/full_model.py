"""What checkpoints of a whole model cost: image, attach, copy, commit, memory of ranks and saver.

PYTHONPATH=.:service torchrun --nproc-per-node 2 benchmarks/full_model.py            # SmolLM2-135M under FSDP2, gloo
PYTHONPATH=.:service torchrun --nproc-per-node 2 benchmarks/full_model.py --adamw    # with the optimizer's state

`python examples/prepare_model.py` makes the model. `gather + save_pretrained` is what rank 0 does without us.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import async_ckpt

MODEL = Path(__file__).resolve().parent.parent / ".cache" / "smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--adamw", action="store_true", help="save the optimizer's state too")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints go (default: a temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = [str(arguments.folder or tempfile.mkdtemp(prefix="full-model-"))]
    dist.broadcast_object_list(folder)
    try:
        measure(arguments, Path(folder[0]))
    finally:
        dist.barrier()
        if dist.get_rank() == 0 and arguments.folder is None:
            shutil.rmtree(folder[0])
        os._exit(0)  # tearing down gloo may hang


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step(model, optimizer)
    say("a rank before attach", *pss(os.getpid()))
    begin_s = time.perf_counter()
    ckpt = async_ckpt.attach(model, optimizer if arguments.adamw else None, directory=folder / "run",
                             slots=arguments.slots, keep_last=1)  # fmt: skip
    attach_s = time.perf_counter() - begin_s
    say("a rank after attach", *pss(os.getpid()))
    say("attach", f"{attach_s:.2f} s")
    handles = []
    for number in range(1, arguments.saves + 1):
        begin_s = time.perf_counter()
        handle = ckpt.save(number)
        call_s = time.perf_counter() - begin_s
        handle.wait()
        handles.append((call_s, handle))
        step(model, optimizer)
    report(handles)
    say("a rank after the saves", *pss(os.getpid()))
    if dist.get_rank() == 0:
        for pid in savers(folder):
            say("the saver", *pss(pid))
    ckpt.close()
    dist.barrier()
    say("gather + save_pretrained", f"{gathered(model, folder / 'theirs'):.2f} s")


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(32).view(1, 32) + dist.get_rank()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def report(handles: list[tuple[float, async_ckpt.SaveHandle]]) -> None:
    total = handles[0][1].bytes or 0
    say("image", f"{total / 1e6:.0f} MB a slot")
    copies, writes, commits = ([getattr(handle, name) or 0.0 for _, handle in handles]
                               for name in ("copy_s", "write_s", "commit_s"))  # fmt: skip
    say("save() returns after", *(f"{call_s * 1e3:.1f} ms" for call_s, _ in handles))
    for name, times_s in (("copy, this rank's share", copies), ("write", writes), ("commit", commits)):
        share = total / dist.get_world_size() if name.startswith("copy") else total
        best_s = statistics.median(times_s)
        rate = f", {share / best_s / 1e9:.2f} GB/s" if name != "commit" and best_s else ""
        say(name, *(f"{each_s:.3f} s" for each_s in times_s), f"(median {best_s:.3f} s{rate})")


def gathered(model: Any, folder: Path) -> float:
    begin_s = time.perf_counter()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        twin = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
        twin.load_state_dict(state, assign=True)
        begin_write_s = time.perf_counter()
        twin.save_pretrained(folder)
        say("  of it save_pretrained, no fsync", f"{time.perf_counter() - begin_write_s:.2f} s")
    dist.barrier()
    return time.perf_counter() - begin_s


def pss(pid: int) -> list[str]:
    """Proportional set size: pages that several processes map are divided among them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return [f"{name} {kib[name] / 1024:.0f} MiB" for name in ("Pss", "Pss_Anon", "Pss_Shmem")]


def savers(folder: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"async_ckpt_saver" in (line := path.read_bytes()) and os.fsencode(folder) in line:
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def say(what: str, *facts: str) -> None:
    if dist.get_rank() == 0:
        print(f"{what:34} {'  '.join(facts)}", flush=True)


if __name__ == "__main__":
    main()
