"""Checkpoints of a Lightning Trainer: a callback, for Lightning's own CheckpointIO is given tensors that were gathered.

    checkpoints = AsyncCheckpoint("runs/lora", every_n_steps=100)
    Trainer(callbacks=[checkpoints], enable_checkpointing=False).fit(module, loader)

`fit` goes on from the newest checkpoint in the directory by itself.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .extras import missing

try:
    from lightning.pytorch import Callback
except ImportError as _error:
    raise missing("lightning", _error) from _error

from async_ckpt import CheckpointError, attach
from async_ckpt.checkpointer import Checkpointer
from async_ckpt.core.location import location_of
from async_ckpt.notices import SIGNALS
from async_ckpt.plain import from_plain, to_plain
from async_ckpt.rng import read_rng, restore_rng

from .common import adapter_names

__all__ = ["AsyncCheckpoint"]

_LOOPS = "lightning_loops"
_LOADERS = "combined_loader"  # Lightning's own key for the states of the data loaders


class AsyncCheckpoint(Callback):  # type: ignore[misc]
    """Saves the adapter, the optimizers, the schedulers and the place in the loops every `every_n_steps` optimizer
    steps, after each epoch if `every_epoch`, and at the end of `fit`; nothing is gathered. The state of other callbacks
    is not saved.

    `resume` True: `fit` begins where the newest checkpoint in `directory` ended, at any number of ranks; nothing is to
    be given as `ckpt_path`. In the middle of an epoch Lightning knows the place of a data loader only if that has a
    state_dict, as torchdata's StatefulDataLoader; other loaders begin their epoch anew. `options`: more arguments of
    `async_ckpt.attach`. `checkpointer`: while `fit` runs, for its `stats()`.

    With `preemption=True` a SIGTERM or SIGUSR1 on any rank ends training after one optimizer step, the same on all
    ranks, which is saved; no validation runs any more, `fit` returns, and `preempted` is True.

    A save that fails is logged, and training goes on. `fit` raises CheckpointError before the first batch if something
    cannot be saved, or if a checkpoint is there that `resume=False` would have to overwrite.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every_n_steps: int | None = 100,
        every_epoch: bool = False,
        resume: bool = True,
        **options: Any,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise CheckpointError(f"every_n_steps={every_n_steps}: give a number of steps above 0, or None")
        self.directory = location_of(directory)
        self.checkpointer: Checkpointer | None = None
        self.preempted = False
        self._every_n_steps = every_n_steps
        self._every_epoch = every_epoch
        self._resume = resume
        self._options = options
        self._resumed_rng: dict[str, Any] | None = None
        self._place: dict[str, Any] | None = None  # Lightning's state of its loops, since the last batch
        self._due = False
        self._limits: tuple[Any, Any, Any] = (None, None, None)  # of the trainer, before a preemption

    # --- the span of one fit ---------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Model and optimizers are wrapped by now, and the loops have not begun."""
        self._place, self._due, self.preempted = None, False, False
        model = trainer.strategy.model
        stateful = dict(self._options.get("stateful", {}))
        loaders = _Loaders(trainer)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.checkpointer = attach(
            model,
            trainer.optimizers,
            _Schedulers(schedulers) if schedulers else None,
            directory=self.directory,
            adapter_name=adapter_names(model),
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            **{**self._options, "stateful": {**stateful, "lightning_loaders": loaders}},
        )
        restored = self.checkpointer.restore() if self._resume else None
        if restored is not None:
            if not isinstance(restored.extra, dict) or _LOOPS not in restored.extra:
                raise CheckpointError(f"{restored.path} was not saved by AsyncCheckpoint, and does not say where in "
                                      f"the loops it is; choose another directory")  # fmt: skip
            loops = from_plain(restored.extra[_LOOPS])
            loops["state_dict"] = {**loops["state_dict"], _LOADERS: loaders.loaded}
            trainer.fit_loop.load_state_dict(loops)
            if not loops["epoch_loop.batch_progress"]["is_last_batch"]:
                self._resumed_rng = read_rng()
        elif self.checkpointer.next_step > 0:
            raise CheckpointError(f"{self.directory} holds checkpoint-{self.checkpointer.next_step - 1}: resume, or "
                                  f"choose another directory")  # fmt: skip

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self._take_signals()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._take_signals()

    def _take_signals(self) -> None:
        if self._options.get("preemption"):
            for number in SIGNALS:
                signal.signal(number, _without_lightnings(signal.getsignal(number)))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self.preempted:
            loop = trainer.fit_loop
            trainer.limit_val_batches, loop.min_epochs, loop.epoch_loop.min_steps = self._limits
        if self.checkpointer is not None:
            self.checkpointer.close()
            self.checkpointer = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.checkpointer is not None:
            self.checkpointer.__exit__(type(exception), exception, exception.__traceback__)
            self.checkpointer = None

    # --- saving ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._resumed_rng is not None:  # drawn from when the iterators were made, which had been made before
            restore_rng(self._resumed_rng)
            self._resumed_rng = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The place in the loops is always one like here, for Lightning resumes from such places best; but what is due
        with the last batch of an epoch waits until the epoch is over: schedulers like ReduceLROnPlateau step then."""
        self._place = trainer.fit_loop.state_dict()
        if self.checkpointer is not None and not self.preempted and self.checkpointer.preempted:
            self._stop(trainer)
        if self._every_n_steps is not None and trainer.global_step % self._every_n_steps == 0:
            if trainer.is_last_batch:
                self._due = True
            else:
                self._save(trainer)

    def _stop(self, trainer: Any) -> None:
        """At the step that all ranks stop after, with nothing more to do than to save it."""
        self.preempted = trainer.should_stop = True
        loop = trainer.fit_loop
        self._limits = trainer.limit_val_batches, loop.min_epochs, loop.epoch_loop.min_steps
        trainer.limit_val_batches, loop.min_epochs, loop.epoch_loop.min_steps = 0, None, None  # they would go on
        if not trainer.is_last_batch:  # else when the epoch is over, as ever
            self._save(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._due or self._every_epoch:
            self._save(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer)

    def _save(self, trainer: Any) -> None:
        """Once a step: batches whose gradients are still being accumulated are in no optimizer yet."""
        step = trainer.global_step
        if self.checkpointer is None or self._place is None or step < self.checkpointer.next_step:
            return
        self._due = False
        inner = {name: each for name, each in self._place["state_dict"].items() if name != _LOADERS}
        loops = {**self._place, "state_dict": inner}
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        self.checkpointer.save(step, metrics=metrics, extra={_LOOPS: to_plain("loops", loops)})


def _without_lightnings(handler: Any) -> Any:
    """What is left of a signal handler without Lightning's part, which runs a collective there, on the signalled ranks
    alone, and ends training by an exception."""
    parts = getattr(handler, "signal_handlers", None)
    if parts is None:
        return handler
    others = [part for part in parts if not type(getattr(part, "__self__", None)).__module__.startswith("lightning.")]
    return others[-1] if others else signal.SIG_DFL


class _Schedulers:
    """All of Lightning's schedulers as one."""

    def __init__(self, schedulers: Sequence[Any]) -> None:
        self._schedulers = schedulers

    def state_dict(self) -> dict[str, Any]:
        return {"schedulers": [each.state_dict() for each in self._schedulers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for scheduler, state in zip(self._schedulers, state_dict["schedulers"], strict=True):
            scheduler.load_state_dict(state)


class _Loaders:
    """The states of this rank's data loaders, by way of the loop that will make them."""

    def __init__(self, trainer: Any) -> None:
        self.loaded: list[Any] = []
        self._loop = trainer.fit_loop

    def state_dict(self) -> dict[str, Any]:
        return {_LOADERS: self._loop.state_dict()["state_dict"].get(_LOADERS, [])}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.loaded = state_dict[_LOADERS]
