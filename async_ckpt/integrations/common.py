"""What every integration needs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel

from async_ckpt.attaching import attach
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import MANIFEST_NAME, parse_step
from async_ckpt.plan import DEFAULT_ADAPTER

_EXPORT = ".async-ckpt-export"


def missing(extra: str, error: ImportError) -> ImportError:
    """What to raise for `error`, met while importing the library of an integration."""
    return ImportError(f"async_ckpt.integrations.{extra}: {error}; pip install 'async-ckpt[{extra}]'")


def adapter_names(model: torch.nn.Module) -> tuple[str, ...]:
    """All adapters of the PEFT model in `model`, however wrapped: `save_pretrained` writes them all."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            return tuple(module.peft_config)
    return (DEFAULT_ADAPTER,)


def is_ours(checkpoint: str | Path) -> bool:
    return Path(checkpoint, MANIFEST_NAME).is_file()


def check_start(directory: str | Path, step: int, advice: str) -> None:
    """Steps only grow: a loop that begins at `step` must not find later checkpoints, whoever wrote them, in its way.

    Raises CheckpointError before the training has cost anything.
    """
    names = [path.name for path in Path(directory).glob("checkpoint-*") if path.is_dir()]
    newest = max((found for found in map(parse_step, names) if found is not None), default=-1)
    if newest > step:
        raise CheckpointError(
            f"{directory} already holds checkpoint-{newest}, but this training begins after step {step}: {advice}; or "
            f"choose another directory, or move the later checkpoints away"
        )


def files_written(write: Callable[[Path], object]) -> dict[str, bytes]:
    """What `write` puts into the folder that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def export(model: torch.nn.Module, directory: str | Path, *, rank: int) -> None:
    """Write the weights alone into `directory` itself, as `save_pretrained` of the unwrapped model would; blocks.

    Every rank calls it; nothing is gathered. A file that is there already is replaced in one step, when the new one is
    durable. Raises CheckpointError if that cannot be done; then `directory` is as it was.
    """
    hidden = Path(directory) / _EXPORT
    with attach(model, directory=hidden, slots=1, adapter_name=adapter_names(model)) as ckpt:
        path = ckpt.save(ckpt.next_step).wait()
    if rank == 0:
        for source in sorted(path.rglob("*")):
            if source.is_file() and source.name != MANIFEST_NAME:
                target = Path(directory) / source.relative_to(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                source.replace(target)
        shutil.rmtree(hidden, ignore_errors=True)
