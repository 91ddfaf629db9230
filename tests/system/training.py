"""What system tests do within a rank: wrapped models, whole values by torch's own means, checks of a checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from async_ckpt import Checkpointer, CheckpointError, attach
from tests.sharding import test_dtensor, test_fsdp1
from tests.system.processes import runs_of, until
from tests.tiny_llama import difference, forward, no_collectives, normal, peft_model, rank, reference

__all__ = ["Checkpointer", "attach", "forward", "no_collectives", "rank", "reference"]

ADAPTER = "adapter_model.safetensors"
WRAPPERS = ("plain", "ddp", "fsdp2", "fsdp1", "fsdp1_flat", "fsdp2_compiled")


def wrapped(kind: str, **twin: Any) -> Any:
    """The same weights on every rank and under every wrapper."""
    model = peft_model(**twin)
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        return test_dtensor.wrap(model)
    if kind == "fsdp1":
        return test_fsdp1.wrap(model, checkpointing=True)
    if kind == "fsdp1_flat":
        return test_fsdp1.wrap(model, original=False, checkpointing=True)
    if kind == "fsdp2_compiled":
        return torch.compile(test_dtensor.wrap(model), backend="eager")
    assert kind == "plain"
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained(model), **{"lr": 0.05, **options})


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of training; with this learning rate it changes every value."""
    forward(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def full_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained values as torch itself gathers them."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return test_fsdp1.full_values(model)
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        # Of a group of one, torch answers with the parameter itself.
        return {name: value.detach().clone() for name, value in test_dtensor.full_values(model).items()}
    return {
        name.removeprefix("module."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def collectives() -> int:
    """How many this process has begun so far, in any thread, by torch's own count."""
    return int(dist.group.WORLD._get_sequence_number_for_group())


def everywhere(mine: Any) -> list[Any]:
    """What each rank says, in the order of ranks."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


def refusal(call: Callable[[], object]) -> str:
    """The message of the CheckpointError that `call` must raise."""
    try:
        result = call()
    except CheckpointError as error:
        return str(error)
    raise AssertionError(f"no CheckpointError, but {result!r}")


def reached(folder: str | Path, mark: str) -> None:
    Path(folder, f"reached-{mark}").touch()


def sleep_until_killed() -> None:
    while True:
        signal.pause()


def kill_all_ranks(pids: list[int]) -> None:
    for pid in pids:
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def keep(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write what a checkpoint is expected to hold where the test finds it when no rank lives any more."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def kept(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _entry(content: bytes, pieces: list[str] | None) -> dict[str, Any]:
    """Of a file, or of one that several hosts have written, whose pieces have to be right as well."""
    if pieces is None:
        return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    start = 0
    for line in pieces:
        stop, _, digest = line.partition(" ")
        assert xxhash.xxh3_64_hexdigest(content[start : int(stop)]) == digest
        start = int(stop)
    text = "".join(f"{line}\n" for line in pieces)
    return {"bytes": start, "pieces_xxh3_128": xxhash.xxh3_128_hexdigest(text.encode())}


def check_checkpoint(path: Path, expected: Mapping[str, bytes], step: int) -> dict[str, Any]:
    """Assert that `path` is what `save_pretrained` wrote, whole, with a true manifest; returns the manifest."""
    files = kept(path)
    manifest: dict[str, Any] = json.loads(files.pop("async_ckpt.json"))
    pieces = manifest.get("pieces", {})
    assert manifest["format"] == (2 if pieces else 1)
    assert manifest["step"] == step
    assert manifest["files"] == {name: _entry(content, pieces.get(name)) for name, content in files.items()}
    tensors = safetensors.torch.load(files[ADAPTER])
    assert len(tensors) > 0
    assert all(tensor.count_nonzero() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert any("lora_B" in name for name in tensors)
    ours = {name: content for name, content in files.items() if not name.startswith("training_state/")}
    assert ours.keys() == expected.keys()
    assert difference(ours.pop(ADAPTER), expected[ADAPTER]) == ""
    assert "README.md" in ours
    assert normal(ours) == normal({name: content for name, content in expected.items() if name != ADAPTER})
    return manifest


def refused(directory: Path, *facts: str, model: Any = None, **options: Any) -> list[str]:
    """attach() must fail on every rank, with all `facts` (patterns) in each message, and leave nothing behind."""
    model = model or wrapped("fsdp2")
    existed, before = directory.exists(), runs_of(directory)
    dist.barrier()
    messages = everywhere(refusal(lambda: attach(model, **{"directory": directory, "timeout_s": 60, **options})))
    for message in messages:
        for fact in facts:
            assert re.search(fact, message), f"{fact!r} is not in {message!r}"
    until(lambda: runs_of(directory) == before, "its slots are gone")
    dist.barrier()
    assert directory.exists() == existed
    step(model, adamw(model))
    return messages
