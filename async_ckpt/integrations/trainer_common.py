"""What the mixin and the callback for the Hugging Face Trainer share. `trainer`, `args`, `state` are Trainer's own."""

from __future__ import annotations

import contextlib
import logging
import signal
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


def stop_if_preempted(ckpt: Checkpointer, state: Any, control: Any) -> bool:
    """After an optimizer step: whether it is the one that all ranks stop after, or a later one. Then Trainer saves it,
    and leaves its loops. An evaluation that is due as well is left out, for there may not be the time."""
    if not ckpt.preempted:
        return False
    control.should_training_stop = True
    control.should_save = ckpt.next_step <= state.global_step  # asked again when the epoch is left
    control.should_evaluate = False
    return True


def without_jit_checkpoint(trainer: Any) -> None:
    """Trainer's own answer to SIGTERM, `enable_jit_checkpoint`, makes the folder before it saves, and each rank saves
    on its own; ours stands in its place, so it and its signal handler have to go."""
    for callback in list(trainer.callback_handler.callbacks):
        manager = getattr(callback, "jit_manager", None)
        if manager is not None:
            trainer.remove_callback(callback)
            if signal.getsignal(signal.SIGTERM) == manager._sigterm_handler:
                signal.signal(signal.SIGTERM, manager._original_sigterm_handler or signal.SIG_DFL)


def settle(ckpt: Checkpointer) -> None:
    try:
        ckpt.wait()
    except CheckpointError as error:
        log.error("%s", error)


def rotate(args: Any, state: Any, directory: str) -> None:
    """Trainer's own rule, by step: it counts what is committed, so it cannot take what is still being written."""
    if args.should_save:
        rotate_checkpoints(directory, args.save_total_limit, state.best_model_checkpoint)
