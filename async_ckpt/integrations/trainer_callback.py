"""A callback for a Hugging Face Trainer that cannot be subclassed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .extras import missing

try:
    from transformers import TrainerCallback
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import HubStrategy, SaveStrategy
except ImportError as _error:
    raise missing("transformers", _error) from _error

from async_ckpt import attach
from async_ckpt.checkpointer import Checkpointer
from async_ckpt.core.errors import CheckpointError
from async_ckpt.rng import read_rng, restore_rng

from .common import adapter_names, check_start, is_ours
from .trainer_common import ADVICE, logged_metrics, restore_at, rotate, stop_if_preempted, trainer_state_kept

log = logging.getLogger(__name__)


class AsyncCheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """For a trainer that cannot be subclassed: `Trainer(..., callbacks=[AsyncCheckpointCallback()])`, the last of them.

    It takes over whenever Trainer, or a callback before it, sets `control.should_save`; what is logged and evaluated at
    that step is in the checkpoint. Trainer itself then never saves, so what hangs on its saving is lost: the best
    model, `on_save` and the states of other callbacks, pushes before the end. Under FSDP Trainer cannot resume from
    what it does not know: there use AsyncCheckpointMixin.

    `options`: more arguments of `async_ckpt.attach`. With `preemption=True` a SIGTERM or SIGUSR1 on any rank ends
    training after one step, the same on all ranks, which is saved; then `preempted` is True.

    Raises CheckpointError when training begins, if the arguments ask for what is lost.
    """

    def __init__(self, **options: Any) -> None:
        self.checkpointer: Checkpointer | None = None
        self.preempted = False
        self._options = options
        self._resumed_rng: dict[str, Any] | None = None
        self._wanted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        lost = {
            "load_best_model_at_end": args.load_best_model_at_end,
            "save_strategy='best'": args.save_strategy == SaveStrategy.BEST,
            f"hub_strategy={str(args.hub_strategy)!r}": args.push_to_hub and args.hub_strategy != HubStrategy.END,
        }
        for name, wanted in lost.items():
            if wanted:
                raise CheckpointError(f"a callback cannot keep the meaning of {name}: use AsyncCheckpointMixin")
        if args.enable_jit_checkpoint:
            raise CheckpointError("enable_jit_checkpoint has each rank save on its own when it is signalled: use "
                                  "AsyncCheckpointCallback(preemption=True) instead")  # fmt: skip
        if self.checkpointer is not None:  # an earlier train() that ended by an exception
            self.checkpointer.close()
        check_start(args.output_dir, state.global_step, ADVICE)
        whole = not args.save_only_model
        self.checkpointer = attach(
            trainer["model"],
            trainer["optimizer"] if whole else None,
            trainer["lr_scheduler"] if whole else None,
            directory=args.output_dir,
            adapter_name=adapter_names(trainer["model"]),
            **self._options,
        )
        self._resumed_rng = None
        self.preempted = self._wanted = False
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.global_step > 0 and is_ours(checkpoint):
            restore_at(self.checkpointer, checkpoint, args.output_dir)
            self._resumed_rng = read_rng()

    def on_step_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        self._save_if_wanted(args, state)  # a trainer of its own kind may log nothing though it was asked to
        if self._resumed_rng is not None:  # skipping the data that was seen has drawn random numbers
            restore_rng(self._resumed_rng)
            self._resumed_rng = None

    def on_step_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        assert self.checkpointer is not None
        self.preempted = stop_if_preempted(self.checkpointer, state, control)
        self._take_over(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        self._take_over(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        if "train_runtime" not in trainer["logs"]:  # the summary, after which Trainer does not look at `control` again
            self._take_over(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        self._take_over(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        log.warning("Trainer has saved step %d itself, as a callback after AsyncCheckpointCallback asked it to: put "
                    "AsyncCheckpointCallback last", state.global_step)  # fmt: skip

    def on_train_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        if self.checkpointer is not None:
            self._save_if_wanted(args, state)
            self.checkpointer.close()
            rotate(args, state, args.output_dir)
            self.checkpointer = None

    def _take_over(self, args: Any, state: Any, control: Any) -> None:
        """Trainer logs, evaluates and saves, in this order; the first two may want a save as well."""
        if self.checkpointer is None:
            return  # an evaluation outside of train
        self._wanted = self._wanted or control.should_save
        control.should_save = False
        if not control.should_evaluate and not (control.should_log and not _has_logged(state)):
            self._save_if_wanted(args, state)

    def _save_if_wanted(self, args: Any, state: Any) -> None:
        assert self.checkpointer is not None
        wanted, self._wanted = self._wanted, False
        if not wanted or self.checkpointer.next_step > state.global_step:
            return  # the last step of an epoch has been saved as a step
        with trainer_state_kept(state) as files:
            state.save_to_json(TRAINER_STATE_NAME)
        self.checkpointer.save(state.global_step, metrics=logged_metrics(state), files=files)
        rotate(args, state, args.output_dir)


def _has_logged(state: Any) -> bool:
    """This step, so that Trainer will not log it once more."""
    return any("loss" in entry for entry in state.log_history if entry.get("step") == state.global_step)
