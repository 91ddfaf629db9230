"""finetune.py as the demo runs it: the training is the same, and the demo hears what it wants to know.

Lines for the demo are MARK and a JSON object; everything else on stdout is finetune.py's own.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import finetune
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import async_ckpt

MARK = "@demo "
ADAPTER = "adapter_model.safetensors"
REPEATS = 3
RANK = int(os.environ["RANK"])
KILL_STEP = int(os.environ["DEMO_KILL_STEP"]) if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else None


def tell(event: str, **values: Any) -> None:
    # One write a line: the ranks share the pipe.
    os.write(1, (MARK + json.dumps({"event": event, "rank": RANK, **values}) + "\n").encode())


class Watched:
    """A Checkpointer that tells the demo what happens to it."""

    def __init__(self, checkpointer: async_ckpt.Checkpointer, model: torch.nn.Module) -> None:
        self._checkpointer = checkpointer
        self._model = model
        self._handles: list[async_ckpt.SaveHandle] = []

    def restore(self) -> async_ckpt.Restored | None:
        started_s = time.perf_counter()
        resumed = self._checkpointer.restore()
        if resumed is not None:
            tell("resumed", step=resumed.step, source=resumed.source, seconds=time.perf_counter() - started_s)
        return resumed

    def save(self, step: int, **values: Any) -> async_ckpt.SaveHandle:
        if self._handles and self._handles[-1].step == KILL_STEP:
            signal.pause()  # the kill is on its way, however quick a step is here
        handle = self._checkpointer.save(step, **values)
        tell("saved", step=step, loss=values["metrics"]["loss"])
        self._handles.append(handle)
        if RANK == 0:
            # In a thread: the training has to be on its way when the demo kills it.
            threading.Thread(target=self._tell_staged, args=(handle,), daemon=True).start()
        return handle

    def close(self) -> None:
        self._checkpointer.close()
        tell("stalls", stalls_s=[handle.stall_s for handle in self._handles])
        compare(self._model, self._handles[-1].wait())

    def _tell_staged(self, handle: async_ckpt.SaveHandle) -> None:
        handle.staged()
        tell("staged", step=handle.step)


def gather(model: torch.nn.Module, *, whole: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Full tensors by name, and their bytes. A collective for each tensor, on every rank."""
    tensors = {
        name: parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
        if whole or parameter.requires_grad
    }
    return tensors, sum(tensor.nbytes for tensor in tensors.values())


def compare(model: Any, checkpoint: Path) -> None:
    """What saving the same model costs when it is gathered first: how long the ranks cannot train."""
    directory = checkpoint.parent / "gathered"
    for way, whole in (("adapter", False), ("model", True)):
        seconds, gathered_bytes = [], 0
        for _ in range(REPEATS):
            dist.barrier()
            started_s = time.perf_counter()
            tensors, gathered_bytes = gather(model, whole=whole)
            if RANK == 0:
                model.save_pretrained(directory, state_dict=tensors)
            dist.barrier()
            seconds.append(time.perf_counter() - started_s)
        if RANK == 0:
            # The last step was saved, and nothing has changed the weights since.
            same = filecmp.cmp(directory / ADAPTER, checkpoint / ADAPTER, shallow=False)
            shutil.rmtree(directory)
            tell("gathered", way=way, p50_s=median(seconds), max_s=max(seconds), bytes=gathered_bytes, same_file=same)


def main() -> None:
    tell("started", pid=os.getpid())
    attach = async_ckpt.attach

    def watched_attach(model: torch.nn.Module, *arguments: Any, **options: Any) -> Watched:
        started_s = time.perf_counter()
        checkpointer = attach(model, *arguments, **options)
        tell("attached", seconds=time.perf_counter() - started_s)
        return Watched(checkpointer, model)

    async_ckpt.attach = watched_attach
    finetune.main()


if __name__ == "__main__":
    main()
