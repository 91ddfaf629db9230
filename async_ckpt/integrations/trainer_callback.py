"""A callback for a Hugging Face Trainer that cannot be subclassed."""

from __future__ import annotations

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
from .trainer_common import ADVICE, logged_metrics, restore_at, rotate, trainer_state_kept


class AsyncCheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """For a trainer that cannot be subclassed: `Trainer(..., callbacks=[AsyncCheckpointCallback()])`.

    It takes over when Trainer is about to save. Trainer itself then never saves, so what hangs on its saving is lost:
    the best model, `on_save` of other callbacks, pushes before the end. Under FSDP Trainer cannot resume from what it
    does not know: there use AsyncCheckpointMixin. `options`: more arguments of `async_ckpt.attach`.

    Raises CheckpointError when training begins, if the arguments ask for what is lost.
    """

    def __init__(self, **options: Any) -> None:
        self.checkpointer: Checkpointer | None = None
        self._options = options
        self._resumed_rng: dict[str, Any] | None = None
        self._after_evaluation = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        lost = {
            "load_best_model_at_end": args.load_best_model_at_end,
            "save_strategy='best'": args.save_strategy == SaveStrategy.BEST,
            f"hub_strategy={str(args.hub_strategy)!r}": args.push_to_hub and args.hub_strategy != HubStrategy.END,
        }
        for name, wanted in lost.items():
            if wanted:
                raise CheckpointError(f"a callback cannot keep the meaning of {name}: use AsyncCheckpointMixin")
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
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.global_step > 0 and is_ours(checkpoint):
            restore_at(self.checkpointer, checkpoint, args.output_dir)
            self._resumed_rng = read_rng()

    def on_step_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        if self._resumed_rng is not None:  # skipping the data that was seen has drawn random numbers
            restore_rng(self._resumed_rng)
            self._resumed_rng = None

    def on_step_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        self._take_over(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        self._take_over(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        if self._after_evaluation:
            self._save(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        if self.checkpointer is not None:
            self.checkpointer.close()
            rotate(args, state, args.output_dir)
            self.checkpointer = None

    def _take_over(self, args: Any, state: Any, control: Any) -> None:
        if control.should_save:
            control.should_save = False
            if control.should_evaluate:
                self._after_evaluation = True  # so that the metrics are in it
            else:
                self._save(args, state)

    def _save(self, args: Any, state: Any) -> None:
        assert self.checkpointer is not None
        self._after_evaluation = False
        if self.checkpointer.next_step > state.global_step:
            return  # the last step of an epoch has been saved as a step
        with trainer_state_kept(state) as files:
            state.save_to_json(TRAINER_STATE_NAME)
        self.checkpointer.save(state.global_step, metrics=logged_metrics(state), files=files)
        rotate(args, state, args.output_dir)
