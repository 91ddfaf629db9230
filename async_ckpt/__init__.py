"""Checkpoints of PEFT adapters under FSDP, committed by another process while training goes on.

    ckpt = async_ckpt.attach(model, directory="runs/llama3-70b-lora")
    ckpt.save(step)
    ckpt.close()

Importing this package imports no torch: `async_ckpt.latest(directory)` works anywhere.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .core.errors import CheckpointError

if TYPE_CHECKING:
    from .attaching import attach
    from .checkpointer import Checkpointer
    from .core.manifest import latest
    from .handle import SaveHandle
    from .restore import Restored

__all__ = ["CheckpointError", "Checkpointer", "Restored", "SaveHandle", "attach", "latest"]

_HOMES = {
    "Checkpointer": "checkpointer",
    "Restored": "restore",
    "SaveHandle": "handle",
    "attach": "attaching",
    "latest": "core.manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_HOMES[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "peft", "transformers", "safetensors"):
            raise CheckpointError(f"async_ckpt.{name} needs {error.name}: pip install 'async-ckpt[train]'") from error
        raise
    return getattr(module, name)
