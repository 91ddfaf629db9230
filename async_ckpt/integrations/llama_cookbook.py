"""llama-cookbook (once llama-recipes) saves its adapters through us, after one call.

    from async_ckpt.integrations import llama_cookbook
    llama_cookbook.patch()

What it decides stays as it is: `save_model`, `run_validation`, one `output_dir` for all epochs, which is read as the
adapter. Each save becomes `output_dir/checkpoint-<n>`; the files of the adapter in `output_dir` are links into the
newest one, so they change all at once, when it is whole and durable.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .extras import missing

try:
    from llama_cookbook.utils import train_utils
except ImportError as _error:
    raise missing("llama_cookbook", _error) from _error

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from async_ckpt import CheckpointError, SaveHandle, attach
from async_ckpt.checkpointer import Checkpointer
from async_ckpt.core.location import local_path

from .common import adapter_names

__all__ = ["patch"]

log = logging.getLogger(__name__)

LINKED = ("adapter_model.safetensors", "adapter_config.json", "README.md")
_IMPORTERS = ("llama_cookbook.finetuning",)  # modules that take `train` by name


def patch(**options: Any) -> None:
    """Replace `save_peft_checkpoint`, and let `train` return when the last save is on disk. Call it before `train`, on
    every rank; a second call changes the `options`, which are more arguments of `async_ckpt.attach`.

    Guarantee: nothing is gathered; `output_dir` always holds a whole adapter, of one step, once it held one. A save
    that fails is logged, and training goes on. Other savers of llama-cookbook, for full models, stay as they are.
    With `preemption=True` a SIGTERM or SIGUSR1 on any rank ends `train` after one optimizer step, the same on all
    ranks, and its adapter is saved; `train` then returns no results. Without `save_model`, signals do what they did.
    Raises ImportError if this llama-cookbook has no such functions.
    """
    for name in ("save_peft_checkpoint", "train"):
        if not hasattr(train_utils, name):
            raise ImportError(f"async_ckpt.integrations.llama_cookbook: this llama-cookbook has no train_utils.{name}; "
                              f"pip install 'async-ckpt[llama_cookbook]'")  # fmt: skip
    train = getattr(train_utils.train, "__wrapped__", train_utils.train)
    saves = _Saves(options)

    @functools.wraps(train)
    def train_and_wait(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(train).bind(*args, **kwargs).arguments
        with saves:
            try:
                with saves.until_preempted(given["model"], given["train_config"]):
                    return train(*args, **kwargs)
            except _PreemptedError:
                return {}

    train_utils.save_peft_checkpoint = saves.save
    train_utils.train = train_and_wait
    for importer in _IMPORTERS:
        if importer in sys.modules:
            sys.modules[importer].train = train_and_wait  # type: ignore[attr-defined]


class _PreemptedError(Exception):
    """Out of the loops of `train`, which ask nobody whether to go on."""


class _Saves:
    """The saves of one process: attached at the first, to a model and an `output_dir`, until `train` ends."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._ckpt: Checkpointer | None = None
        self._target: tuple[torch.nn.Module, Path] | None = None

    def save(self, model: torch.nn.Module, model_path: str) -> None:
        """In the place of `save_peft_checkpoint`."""
        directory = local_path(model_path, "llama-cookbook's output_dir")
        ckpt = self._attached(model, directory)
        handle = ckpt.save(ckpt.next_step)
        if ckpt.rank == 0:
            _show(directory, handle)

    @contextlib.contextmanager
    def until_preempted(self, model: torch.nn.Module, config: Any) -> Iterator[None]:
        """Raises _PreemptedError from the optimizer step that all ranks stop after, when it is done and saved."""
        if not (self._options.get("preemption") and config.use_peft and config.save_model):
            yield
            return
        ckpt = self._attached(model, Path(config.output_dir))

        def after_step(*_: Any) -> None:
            if ckpt.preempted:
                self.save(model, config.output_dir)
                raise _PreemptedError

        hook = register_optimizer_step_post_hook(after_step)
        try:
            yield
        finally:
            hook.remove()

    def _attached(self, model: torch.nn.Module, directory: Path) -> Checkpointer:
        if self._ckpt is None or self._target is None or self._target[0] is not model or self._target[1] != directory:
            self._close()
            self._target = (model, directory)
            self._ckpt = attach(model, directory=directory, adapter_name=adapter_names(model), **self._options)
        return self._ckpt

    def __enter__(self) -> None:
        self._close()

    def __exit__(self, *failure: Any) -> None:
        ckpt, self._ckpt, self._target = self._ckpt, None, None
        if ckpt is not None:
            ckpt.__exit__(*failure)

    def _close(self) -> None:
        self.__exit__(None, None, None)


def _show(directory: Path, handle: SaveHandle) -> None:
    """Let the files of the adapter in `directory` be links into the newest checkpoint.

    They may dangle until the first one is there, as if there were none; but an adapter that lies there as files is
    replaced only when there is something to replace it.
    """
    if any((directory / name).exists() and not (directory / name).is_symlink() for name in LINKED):
        try:
            handle.wait()
        except CheckpointError as error:
            log.error("%s; the adapter in %s is an earlier one", error, directory)
            return
    for name in LINKED:
        target = f"latest/{name}"
        path = directory / name
        if not (path.is_symlink() and os.readlink(path) == target):
            temporary = directory / f".{name}.{secrets.token_hex(8)}.tmp"
            temporary.symlink_to(target)
            temporary.replace(path)
