"""The Checkpointer: what a training loop sees after attach()."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import operator
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.protocol import SaveRecord, Settled, Traced, Uploaded, Word

from . import restoring
from .files import own_files
from .handle import SaveHandle
from .joined import Joined, Settings
from .loading import fence_before_loading
from .plan import save_record
from .preemption import Preemption
from .restore import Restored
from .restoring import Found
from .saves import Saves
from .sharding import reshard
from .trace import Trace

log = logging.getLogger(__name__)

_LEAVE_S = 10.0  # how long a process that ends by an exception, or without close(), waits for its own copies


class Checkpointer:
    """Made by `async_ckpt.attach`. Every rank calls the same methods with the same steps; none is a collective.

    Training never dies because a checkpoint failed: `save` raises only for what is wrong in the call itself, and a
    failure afterwards is a logged error and a failed handle.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: Settings,
        joined: Joined,
        *,
        preemption: Preemption | None,
        rejoin: Callable[[], Joined],
        on_close: Callable[[], None],
        trace: Trace | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._rejoin = rejoin
        self._on_close = on_close
        self._resume = joined.started.resume
        self._newest_step = joined.started.newest_step  # no later save may go below
        self._closed = False
        self._preemption = preemption
        self._trace = trace
        self._saves = Saves(settings, joined, trace)
        self._use(joined)
        self._restored_or_warned = self._resume is None or settings.rank != 0
        self._hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: self._before_step(optimizer))
        self._unhook_loading = fence_before_loading(model, self.fence)
        self._pid = os.getpid()
        atexit.register(self._at_exit)

    # --- what a training loop calls --------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        *,
        metrics: Mapping[str, Any] | None = None,
        extra: Any = None,
        files: Mapping[str, bytes] | None = None,
    ) -> SaveHandle:
        """Snapshot the weights as they are now and return; the copy and the commit go on behind the training.

        `step` must grow from save to save. `metrics` (numbers, strings) and `extra` (JSON) go into the manifest, and
        `files` (path -> bytes, at most 64 MiB in all) beside the weights, as rank 0 gives them. With all slots busy it
        waits for one, or skips this save: attach's `when_busy`.
        Raises CheckpointError if the checkpointer is closed, for a step that is not newer than what was saved or
        what the directory holds, for metrics or extra that JSON cannot hold, and for files that have no place.
        """
        started_s = time.perf_counter()
        step = self._check_save(step)
        record = save_record(step, metrics, extra, own_files(files, self._plan.paths if files else ()))
        self._newest_step = step
        handle = self._instead(step)
        return handle if handle is not None else self._start(record, started_s)

    @property
    def preempted(self) -> bool:
        """Whether this job is about to be ended (SIGTERM or SIGUSR1 on any rank, with attach's `preemption`): save and
        leave. Turns true at the same optimizer step on every rank, so read it after `optimizer.step()`; costs nothing
        to speak of. The step at which it turns true is saved, if not by the training loop then by itself."""
        return self._preemption is not None and self._preemption.preempted

    @property
    def rank(self) -> int:
        return self._settings.rank

    @property
    def next_step(self) -> int:
        """The least step that may be saved next, the same on every rank: for loops that count no steps themselves."""
        return 0 if self._newest_step is None else self._newest_step + 1

    def fence(self) -> None:
        """After this no copy reads a parameter any more. Every torch optimizer's `step`, and `load_state_dict`, call it
        by themselves; call it before anything else that writes into parameters in place, such as EMA swaps."""
        traced = self._trace is not None and self._staging.copying
        started_s = time.perf_counter()
        waited_s = self._staging.fence()
        if traced and self._trace is not None and self._saves.last is not None:
            self._trace.called("fence", self._saves.last.step, started_s)
        if self._saves.last is not None and waited_s > 0:
            self._saves.stats.add_stall(self._saves.last, waited_s)

    def restore(
        self, checkpoint: str | int | os.PathLike[str] = "latest", *, training_state: bool = True
    ) -> Restored | None:
        """Load a checkpoint into the model, each rank its own part; None if there is none yet.

        "latest": the newest committed one, the same on every rank. Else a step, or the path of a checkpoint; also of
        one that PEFT or transformers wrote, whose step is that of its name, "checkpoint-<step>", or else -1: training
        begins at 0. Bytes come from RAM where the saver still holds them, else from disk. `training_state` False: the
        weights alone; optimizer, scheduler and random numbers stay as they are.
        Raises CheckpointError, listing the differences, if it does not fit the model, which is left as it was, or if a
        rank of another host does not see it.
        """
        if self._closed:
            raise CheckpointError("restore() after close(): attach again")
        self._restored_or_warned = True
        slots = self._staging.slots
        place_of = self._settings.place_of
        found = self._newest() if checkpoint == "latest" else restoring.find(checkpoint, place_of, slots)
        if found is None:
            return None
        if self._hosts is not None:
            self._hosts.all_see(found.path, self._settings.timeout_s, needed=not found.whole_in_ram)
        self.fence()
        reshard(self._model)
        plan = self._plan if training_state else dataclasses.replace(self._plan, state=None)
        description, source = restoring.read(plan, found, slots)
        path = found.path
        step, given = description.step, path
        if path.parent.resolve() == self._settings.directory:
            self._newest_step = step if self._newest_step is None else max(step, self._newest_step)
            given = self._settings.given / path.name
        if self._preemption is not None:
            self._preemption.restored(step)
        return Restored(step, dict(description.metrics), description.extra, source, given)

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when every save so far has its outcome; of uploads to a second tier the handles tell (`uploaded`).
        Raises CheckpointError for the first one that failed, unless its handle has said so already."""
        self._save_if_due()
        open_now = list(self._saves.open.values())
        for handle in [*self._saves.take_failed(), *open_now]:
            # One that failed here is open until the saver has settled it.
            if handle.failed_unnoticed or (handle in open_now and handle.state != "failed"):
                handle.wait(timeout_s)

    def close(self) -> None:
        """Wait until everything staged is committed, then leave: uploads to a second tier go on behind. Safe to call
        twice; never raises: what could not be saved is logged, and its handle says why."""
        if self._closed:
            return
        self._save_if_due()
        deadline_s = time.monotonic() + self._settings.timeout_s
        for handle in list(self._saves.open.values()):
            try:
                handle.wait(max(0.0, deadline_s - time.monotonic()))
            except CheckpointError as error:
                log.error("%s", error)
        if self._trace is not None and self.rank == 0 and self._saves.committed is not None:
            self._trace.wait_heard(self._saves.committed.step)
        self._leave(None)

    def stats(self) -> dict[str, float]:
        """Counts and seconds since attach, flat, for a logger of metrics."""
        return dataclasses.asdict(self._saves.stats)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._leave(_LEAVE_S)  # other ranks may never stage what is open: the saver decides, we do not wait

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._restored_or_warned:
            self._restored_or_warned = True
            log.warning("%s holds checkpoint-%s, and restore() was not called: training begins anew",
                        self._settings.given, self._newest_step)  # fmt: skip
        if self._preemption is not None:
            if self._preemption.begins(optimizer):
                self._save_if_due()
            self._preemption.begin(optimizer)
        self.fence()

    # --- the run it belongs to -------------------------------------------------------------------------------------

    def _use(self, joined: Joined) -> None:
        self._plan, self._staging, self._client, self._hosts = joined.plan, joined.staging, joined.client, joined.hosts
        self._saves.use(joined)
        if self._preemption is not None:
            self._preemption.join(joined.client)
        self._client.listen(
            on_settled=self._settled,
            on_lost=self._on_lost,
            on_turn=self._preemption.on_turn if self._preemption is not None else lambda incarnation: None,
            on_word=self._on_word,
        )

    def _on_word(self, word: Word) -> None:
        if isinstance(word, Traced):
            if self._trace is not None:
                self._trace.heard(word)
        elif isinstance(word, Uploaded):
            self._saves.uploaded(word)
        elif self._preemption is not None:
            self._preemption.on_word(word)

    def _renew(self) -> None:
        """Go on in a new run, with the layout that the model has now. The ranks' models change alike, so all of them
        come here in the same save; it is the one kind of save in which ranks wait for each other."""
        if self._saves.lost is not None:
            return
        self._saves.release(self._settings.timeout_s)
        self._staging.close()
        self._client.close()
        try:
            self._use(self._rejoin())
        except Exception as error:  # training goes on without checkpoints
            if not isinstance(error, CheckpointError):
                log.exception("the new layout could not be planned")
            self._on_lost(f"the model has changed, and the new layout was refused: {error}")

    def _settled(self, settled: Settled) -> None:
        self._saves.settled(settled)
        if self._preemption is not None:
            self._preemption.settled(settled.step)

    def _on_lost(self, reason: str) -> None:
        if self._closed:
            return
        self._saves.lose(reason)
        if self._preemption is not None:
            self._preemption.lost()

    # --- one save --------------------------------------------------------------------------------------------------

    def _check_save(self, step: int) -> int:
        try:
            step = operator.index(step)  # numpy's integers are not Python's
        except TypeError as error:
            raise CheckpointError(f"save({step!r}): the step must be a whole number") from error
        if self._closed:
            raise CheckpointError(f"save({step}) after close(): attach again to save more")
        if self._newest_step is None or step > self._newest_step:
            return step
        if self._saves.last is not None:
            raise CheckpointError(f"save({step}): step {self._newest_step} was saved already, and steps must grow: "
                                  f"count over all epochs")  # fmt: skip
        raise CheckpointError(
            f"save({step}): {self._settings.directory} already holds checkpoint-{self._newest_step}. Go on from it: "
            f"resumed = ckpt.restore(), then start at resumed.step + 1; or choose another directory; or, to go on from "
            f"an older one, move the newer ones away"
        )

    def _start(self, record: SaveRecord, started_s: float, *, inferred: bool = False) -> SaveHandle:
        due = self._preemption is not None and self._preemption.due
        if self._plan.outdated:
            self._renew()
        handle = self._saves.start(record, when_busy="wait" if due else self._settings.when_busy)
        if self._preemption is not None:
            self._preemption.saved(handle, due=due, inferred=inferred)
        self._saves.stats.add_stall(handle, time.perf_counter() - started_s)
        if self._trace is not None:
            self._trace.called("save", handle.step, started_s)
        return handle

    def _save_if_due(self) -> None:
        """Save the step that the ranks agreed on, in the last moment at which the parameters are still its own."""
        if self._preemption is None or self._closed or not self._preemption.due:
            return
        started_s = time.perf_counter()
        try:
            record = save_record(self._preemption.number(self._newest_step), None, None)
            self._start(record, started_s, inferred=True)
        except CheckpointError as error:  # training goes on
            log.error("the step to resume from could not be saved: %s", error)

    def _instead(self, step: int) -> SaveHandle | None:
        """The answer to a save whose number went to one that was made in the user's stead."""
        earlier = self._preemption.stands_for(step) if self._preemption is not None else None
        if self._preemption is None or earlier is None:
            return None
        if self._preemption.unchanged:
            return earlier
        return self._saves.skip(step, f"the step saved on preemption was called {earlier.step}; steps must grow")

    # --- restore and leave -----------------------------------------------------------------------------------------

    def _newest(self) -> Found | None:
        """What this run has committed last, else what lay there when it began: the same on every rank."""
        for handle in list(self._saves.open.values()):
            handle.wait_released(self._settings.timeout_s)
        if self._saves.committed is not None:
            return restoring.find(self._saves.committed.step, self._settings.place_of, self._staging.slots)
        if self._resume is None:
            return None
        image = Path(self._resume.image) if self._resume.image is not None else None
        return Found(self._settings.place_of(self._resume.step), image)

    def _leave(self, copy_timeout_s: float | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._hook.remove()
        self._unhook_loading()
        if self._preemption is not None:
            self._preemption.close()
        self._staging.close(copy_timeout_s)
        self._client.close()
        atexit.unregister(self._at_exit)
        self._on_close()
        self._saves.leave()
        if self._trace is not None:
            self._trace.close()

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:
            self._leave(_LEAVE_S)
