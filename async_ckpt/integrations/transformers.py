"""Checkpoints of the Hugging Face Trainer, and of trainers made from it, such as TRL's.

    class MyTrainer(AsyncCheckpointMixin, SFTTrainer):
        pass

Trainer goes on to decide when to save, what is best, what is removed and where to resume; only who writes the folder
changes. `trainer_state.json` and the tokenizer ride in our commit, so the folder appears whole or not at all.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .extras import missing

try:
    from transformers import Trainer
    from transformers.trainer_utils import HubStrategy, SaveStrategy
except ImportError as _error:
    raise missing("transformers", _error) from _error

from async_ckpt import SaveHandle, attach
from async_ckpt.checkpointer import Checkpointer
from async_ckpt.core.errors import CheckpointError
from async_ckpt.rng import read_rng, restore_rng

from .common import adapter_names, check_start, export, is_ours, wait_for_staged
from .trainer_callback import AsyncCheckpointCallback
from .trainer_common import (
    ADVICE,
    logged_metrics,
    restore_at,
    rotate,
    settle,
    stop_if_preempted,
    tokenizer_files,
    trainer_state_kept,
    without_jit_checkpoint,
)

__all__ = ["AsyncCheckpointCallback", "AsyncCheckpointMixin"]

log = logging.getLogger(__name__)

_OVERRIDDEN = (
    "_finalize_training", "_get_output_dir", "_inner_training_loop", "_load_best_model", "_load_from_checkpoint",
    "_load_optimizer_and_scheduler", "_load_rng_state", "_load_scaler", "_maybe_log_save_evaluate",
    "_prepare_for_training", "_push_from_checkpoint", "_save_checkpoint", "_save_optimizer_and_scheduler",
    "_save_rng_state", "_save_scaler", "save_model",
)  # fmt: skip
if _unknown := [name for name in _OVERRIDDEN if not hasattr(Trainer, name)]:
    raise ImportError(f"async_ckpt.integrations.transformers: this transformers has no Trainer.{_unknown[0]}; "
                      f"pip install 'async-ckpt[transformers]' for a version that is known to work")  # fmt: skip


class AsyncCheckpointMixin:
    """Put it before the trainer class: `class MyTrainer(AsyncCheckpointMixin, SFTTrainer)`.

    Guarantee: `<output_dir>/checkpoint-<step>` appears whole, with `trainer_state.json`, or not at all. Training waits
    for storage only where Trainer's meaning needs the folder: before a push to the hub, before the best model is
    loaded, and at the end of `train`. Nothing is gathered, under FSDP neither. A save that fails is logged, and
    training goes on.

    `checkpoint_options`: more arguments of `async_ckpt.attach`, as in `{"when_busy": "skip"}`. `wait_on_save`: True if
    callbacks read the folder in `on_save`, which otherwise is called before it is there. `checkpointer`: while `train`
    runs, for its `stats()`. `last_save`: the handle of the newest save.

    With `enable_jit_checkpoint`, or `{"preemption": True}` among the options, SIGTERM or SIGUSR1 on any rank ends
    training after one step, the same on all ranks, which is saved whatever `save_strategy` says; `train` returns, and
    `preempted` is True.

    `train` raises CheckpointError before the first step if the model or the optimizer cannot be saved, or if
    `output_dir` holds later checkpoints than the one it begins at.
    """

    checkpoint_options: ClassVar[Mapping[str, Any]] = {}
    wait_on_save: bool = False
    checkpointer: Checkpointer | None = None
    last_save: SaveHandle | None = None
    preempted: bool = False

    # Trainer's own, as far as they are used here.
    accelerator: Any
    args: Any
    control: Any
    data_collator: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    is_in_train: bool
    lr_scheduler: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    processing_class: Any
    state: Any
    is_world_process_zero: Any
    push_to_hub: Any
    _get_output_dir: Any
    _trial: Any

    _saving: bool = False
    _push_wanted: bool = False
    _resumed_rng: Mapping[str, Any] | None = None

    # --- the span of one training loop -----------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **more: Any) -> Any:
        """Trainer's own, which is what the user calls."""
        parent: Any = super()
        if resume_from_checkpoint is True:
            wait_for_staged(self.args.output_dir)
        return parent.train(resume_from_checkpoint, *arguments, **more)

    def _inner_training_loop(self, batch_size: int | None = None, **arguments: Any) -> Any:
        parent: Any = super()
        try:
            output = parent._inner_training_loop(batch_size=batch_size, **arguments)
        except BaseException:
            if self.checkpointer is not None:
                self.checkpointer.__exit__(*sys.exc_info())
            raise
        else:
            if self.checkpointer is not None:
                self.checkpointer.close()
            return output
        finally:
            self.checkpointer = self._resumed_rng = None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        parent: Any = super()
        prepared = parent._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.preempted = False
        if self.args.save_strategy != SaveStrategy.NO or self._options["preemption"]:
            self._attached()  # now, so that what cannot be saved is an error before the first step
        return prepared

    @property
    def _options(self) -> dict[str, Any]:
        return {"preemption": self.args.enable_jit_checkpoint, **self.checkpoint_options}

    def _attached(self) -> Checkpointer:
        if self.checkpointer is None:
            if self.is_deepspeed_enabled:
                raise CheckpointError("AsyncCheckpointMixin does not know DeepSpeed's parameters: train under FSDP")
            directory = self._get_output_dir(self._trial)
            check_start(directory, self.state.global_step, ADVICE)
            without_jit_checkpoint(self)
            whole = not self.args.save_only_model
            self.checkpointer = attach(
                self.model_wrapped,
                self.optimizer if whole else None,
                self.lr_scheduler if whole else None,
                scaler=self.accelerator.scaler if whole else None,
                directory=directory,
                adapter_name=adapter_names(self.model_wrapped),
                files=tokenizer_files(self) if self.args.should_save else None,
                **self._options,
            )
        return self.checkpointer

    def _maybe_log_save_evaluate(self, *arguments: Any, **more: Any) -> None:
        """After every optimizer step, and once more after an epoch."""
        parent: Any = super()
        if self.checkpointer is not None:
            self.preempted = stop_if_preempted(self.checkpointer, self.state, self.control)
        parent._maybe_log_save_evaluate(*arguments, **more)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Here Trainer reads checkpoints, and removes some: those under way have to be there."""
        parent: Any = super()
        if self.checkpointer is not None:
            settle(self.checkpointer)
            rotate(self.args, self.state, self._get_output_dir(trial))
            best = self.state.best_model_checkpoint
            if best is not None and not os.path.isdir(best):
                log.error("the best checkpoint %s could not be saved: the model stays as it is now", best)
                self.state.best_model_checkpoint = None
        limit = self.args.save_total_limit
        if self.preempted:
            self.args.save_total_limit = None  # a limit of 1 would leave the best one, and nothing to resume from
        try:
            return parent._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    # --- saving ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's own runs with every writer below turned off; what it leaves is what our commit takes along."""
        parent: Any = super()
        ckpt = self._attached()
        if ckpt.next_step > self.state.global_step:
            return  # a callback asked for it once more at the end of an epoch: nothing was trained since
        self._saving, self._push_wanted = True, False
        try:
            with trainer_state_kept(self.state) as files:
                parent._save_checkpoint(model, trial)
        finally:
            self._saving = False
        handle = self.last_save = ckpt.save(self.state.global_step, metrics=logged_metrics(self.state), files=files)
        if self.wait_on_save:
            _arrived(handle)
        if self._push_wanted and _arrived(handle):
            self._push_from_checkpoint(_folder(self, trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        parent: Any = super()
        if self._saving:
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = output_dir  # Trainer would look whether it is there already
        elif not self.is_fsdp_enabled:
            parent.save_model(output_dir, _internal_call=_internal_call)
        else:
            directory = Path(output_dir or self.args.output_dir)
            export(self.model, directory, rank=self.args.process_index)
            if self.args.should_save:
                for name, content in tokenizer_files(self).items():
                    (directory / name).write_bytes(content)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        parent: Any = super()
        if not self._saving:
            parent._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        parent: Any = super()
        if not self._saving:
            parent._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        parent: Any = super()
        if not self._saving:
            parent._save_rng_state(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        parent: Any = super()
        if not self._saving:
            parent._push_from_checkpoint(checkpoint_folder)
        else:
            self._push_wanted = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END

    # --- resuming --------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Within `train` the weights come with the optimizer, when both are wrapped."""
        parent: Any = super()
        if not (self.is_in_train and is_ours(resume_from_checkpoint)):
            parent._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        parent: Any = super()
        if checkpoint is None or not is_ours(checkpoint):
            parent._load_optimizer_and_scheduler(checkpoint)
            return
        restore_at(self._attached(), checkpoint, self._get_output_dir(self._trial))
        self._resumed_rng = read_rng()

    def _load_scaler(self, checkpoint: str | None) -> None:
        parent: Any = super()
        if checkpoint is None or not is_ours(checkpoint):
            parent._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called once more when the data that was seen has been skipped, for that draws random numbers."""
        parent: Any = super()
        if self._resumed_rng is not None:
            restore_rng(dict(self._resumed_rng))
        else:
            parent._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        parent: Any = super()
        if self.preempted:
            log.warning("preempted: the best model is loaded at the end of the training that resumes from here")
        elif self.checkpointer is not None and is_ours(self.state.best_model_checkpoint):
            self.checkpointer.restore(self.state.best_model_checkpoint, training_state=False)
        else:
            parent._load_best_model()


def _folder(trainer: Any, trial: Any) -> str:
    return os.path.join(trainer._get_output_dir(trial), f"checkpoint-{trainer.state.global_step}")


def _arrived(handle: SaveHandle) -> bool:
    try:
        handle.wait()
    except CheckpointError as error:
        log.error("%s", error)
        return False
    return True
