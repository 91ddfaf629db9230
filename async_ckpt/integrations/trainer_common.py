"""What the mixin and the callback for the Hugging Face Trainer share. `trainer`, `args`, `state` are Trainer's own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .extras import missing

try:
    from transformers.trainer_utils import rotate_checkpoints
except ImportError as _error:
    raise missing("transformers", _error) from _error

from async_ckpt import latest
from async_ckpt.checkpointer import Checkpointer
from async_ckpt.core.errors import CheckpointError

from .common import files_written

log = logging.getLogger(__name__)

ADVICE = "train(resume_from_checkpoint=True) goes on from it"


@contextlib.contextmanager
def trainer_state_kept(state: Any) -> Iterator[dict[str, bytes]]:
    """Trainer writes its state into the folder, which is not there yet: yields what it would have written."""
    kept: dict[str, bytes] = {}

    def keep(path: str) -> None:
        kept.update(files_written(lambda folder: type(state).save_to_json(state, folder / Path(path).name)))

    state.save_to_json = keep
    try:
        yield kept
    finally:
        del state.save_to_json


def tokenizer_files(trainer: Any) -> dict[str, bytes]:
    """What Trainer puts beside the weights: those of `processing_class`, else of the collator's tokenizer."""
    tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    return {} if tokenizer is None else files_written(tokenizer.save_pretrained)


def logged_metrics(state: Any) -> dict[str, float]:
    """What was logged at this step: loss, learning rate, evaluation."""
    now = [entry for entry in state.log_history if entry.get("step") == state.global_step]
    return {
        name: value
        for entry in now
        for name, value in entry.items()
        if isinstance(value, int | float) and name != "step"
    }


def restore_at(ckpt: Checkpointer, checkpoint: str | Path, directory: str | Path) -> None:
    """`ckpt` is attached to `directory`. The newest checkpoint there is asked for as such, since it may still
    lie in RAM."""
    path = Path(checkpoint).resolve()
    newest = latest(Path(directory).resolve())
    ckpt.restore("latest" if newest == path else path)


def settle(ckpt: Checkpointer) -> None:
    try:
        ckpt.wait()
    except CheckpointError as error:
        log.error("%s", error)


def rotate(args: Any, state: Any, directory: str) -> None:
    """Trainer's own rule, by step: it counts what is committed, so it cannot take what is still being written."""
    if args.should_save:
        rotate_checkpoints(directory, args.save_total_limit, state.best_model_checkpoint)
