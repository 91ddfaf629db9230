"""The Checkpointer: what a training loop sees after attach()."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import operator
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import checkpoint_name
from async_ckpt.core.protocol import Failed, SaveRecord, Settled, Skipped, Staged, Started

from . import restoring
from .client import Client
from .files import own_files
from .handle import SaveHandle
from .loading import fence_before_loading
from .mapped import Slot
from .plan import Plan, save_record
from .restore import Restored
from .restoring import Found
from .sharding import reshard
from .staging import Copy, MakeRecord, Staging
from .stats import Stats

log = logging.getLogger(__name__)

_LEAVE_S = 10.0  # how long a process that ends by an exception, or without close(), waits for its own copies


@dataclass(frozen=True)
class Settings:
    """What the user chose, as far as a Checkpointer needs it. `directory` is absolute; `given` is how the user named
    it, and names the paths that are returned. `saver` says in an error where to look next."""

    directory: Path
    given: Path
    rank: int
    when_busy: Literal["wait", "skip"]
    timeout_s: float
    saver: str


@dataclass(frozen=True)
class Joined:
    """A run that every rank has joined."""

    plan: Plan
    staging: Staging
    client: Client
    started: Started


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
        rejoin: Callable[[], Joined],
        on_close: Callable[[], None],
    ) -> None:
        self._model = model
        self._settings = settings
        self._rejoin = rejoin
        self._on_close = on_close
        self._resume = joined.started.resume
        self._newest_step = joined.started.newest_step  # no later save may go below
        self._open: dict[int, SaveHandle] = {}  # step -> handle, until the saver has settled it
        self._last: SaveHandle | None = None
        self._committed: SaveHandle | None = None
        self._stuck: SaveHandle | None = None  # the occupant of a slot that was waited for in vain
        self._failed: list[SaveHandle] = []  # since the last wait()
        self._lost: str | None = None
        self._closed = False
        self._stats = Stats()
        self._use(joined)
        self._restored_or_warned = self._resume is None or settings.rank != 0
        self._hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: self._before_step())
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
        record = save_record(step, metrics, extra, own_files(files, self._plan.paths))
        if self._plan.outdated:
            self._renew()
        slot = self._staging.slots[self._calls % len(self._staging.slots)]
        self._calls += 1  # also when skipped: all ranks must go through the slots in step
        self._newest_step = step
        self._stats.saves += 1
        handle = SaveHandle(step, self._settings.given / checkpoint_name(step), self._settings.timeout_s)
        self._last = handle
        if self._lost is not None:
            self._end(handle, "failed", self._lost)
        elif self._slot_free(slot, handle):
            self._begin(slot, handle, record)
        self._stats.add_stall(handle, time.perf_counter() - started_s)
        return handle

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
        waited_s = self._staging.fence()
        if self._last is not None and waited_s > 0:
            self._stats.add_stall(self._last, waited_s)

    def restore(
        self, checkpoint: str | int | os.PathLike[str] = "latest", *, training_state: bool = True
    ) -> Restored | None:
        """Load a checkpoint into the model, each rank its own part; None if there is none yet.

        "latest": the newest committed one, the same on every rank. Else a step, or the path of a checkpoint; also of
        one that PEFT or transformers wrote, whose step is that of its name, "checkpoint-<step>", or else -1: training
        begins at 0. Bytes come from RAM where the saver still holds them, else from disk. `training_state` False: the
        weights alone; optimizer, scheduler and random numbers stay as they are.
        Raises CheckpointError listing the differences if it does not fit the model, which is left as it was.
        """
        if self._closed:
            raise CheckpointError("restore() after close(): attach again")
        self._restored_or_warned = True
        slots = self._staging.slots
        found = (
            self._newest() if checkpoint == "latest" else restoring.find(checkpoint, self._settings.directory, slots)
        )
        if found is None:
            return None
        self.fence()
        reshard(self._model)
        plan = self._plan if training_state else dataclasses.replace(self._plan, state=None)
        description, source = restoring.read(plan, found, slots)
        path = found.path
        step, given = description.step, path
        if path.parent.resolve() == self._settings.directory:
            self._newest_step = step if self._newest_step is None else max(step, self._newest_step)
            given = self._settings.given / path.name
        return Restored(step, dict(description.metrics), description.extra, source, given)

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when every save so far has its outcome. Raises CheckpointError for the first one that failed, unless
        its handle has said so already."""
        open_now = list(self._open.values())
        failed, self._failed = self._failed, []
        for handle in [*failed, *open_now]:
            # One that failed here is open until the saver has settled it.
            if handle.failed_unnoticed or (handle in open_now and handle.state != "failed"):
                handle.wait(timeout_s)

    def close(self) -> None:
        """Wait until everything staged is committed, then leave. Safe to call twice; never raises: what could not be
        saved is logged, and its handle says why."""
        if self._closed:
            return
        deadline_s = time.monotonic() + self._settings.timeout_s
        for handle in list(self._open.values()):
            try:
                handle.wait(max(0.0, deadline_s - time.monotonic()))
            except CheckpointError as error:
                log.error("%s", error)
        self._leave(None)

    def stats(self) -> dict[str, float]:
        """Counts and seconds since attach, flat, for a logger of metrics."""
        return dataclasses.asdict(self._stats)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._leave(_LEAVE_S)  # other ranks may never stage what is open: the saver decides, we do not wait

    def _before_step(self) -> None:
        if not self._restored_or_warned:
            self._restored_or_warned = True
            log.warning("%s holds checkpoint-%s, and restore() was not called: training begins anew",
                        self._settings.given, self._newest_step)  # fmt: skip
        self.fence()

    # --- the run it belongs to -------------------------------------------------------------------------------------

    def _use(self, joined: Joined) -> None:
        self._plan, self._staging, self._client = joined.plan, joined.staging, joined.client
        self._calls = 0
        self._occupants: dict[int, SaveHandle] = {}  # slot -> the last save that went into it
        self._client.listen(on_settled=self._settled, on_lost=self._on_lost)

    def _renew(self) -> None:
        """Go on in a new run, with the layout that the model has now. The ranks' models change alike, so all of them
        come here in the same save; it is the one kind of save in which ranks wait for each other."""
        if self._lost is not None:
            return
        for handle in list(self._open.values()):
            if not handle.wait_released(self._settings.timeout_s):
                self._end(handle, "failed", f"not settled after {self._settings.timeout_s:g} s")
        self._open.clear()
        self._staging.close()
        self._client.close()
        try:
            self._use(self._rejoin())
        except Exception as error:  # training goes on without checkpoints
            if not isinstance(error, CheckpointError):
                log.exception("the new layout could not be planned")
            self._on_lost(f"the model has changed, and the new layout was refused: {error}")

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
        if self._last is not None:
            raise CheckpointError(f"save({step}): step {self._newest_step} was saved already, and steps must grow: "
                                  f"count over all epochs")  # fmt: skip
        raise CheckpointError(
            f"save({step}): {self._settings.directory} already holds checkpoint-{self._newest_step}. Go on from it: "
            f"resumed = ckpt.restore(), then start at resumed.step + 1; or choose another directory; or, to go on from "
            f"an older one, move the newer ones away"
        )

    def _slot_free(self, slot: Slot, handle: SaveHandle) -> bool:
        """Wait for the slot as `when_busy` says. If it stays busy, `handle` is ended and the other ranks are told."""
        occupant = self._occupants.get(slot.index)
        if occupant is None or occupant.released:
            return True
        if self._settings.when_busy == "skip":
            self._give_up(slot, handle, "skipped", f"slot {slot.index} still holds step {occupant.step}")
            return False
        started_s = time.perf_counter()
        # Once waited for in vain, and nothing heard of the saver since: every save would cost the whole timeout.
        hopeless = occupant is self._stuck and self._client.silent()
        free = occupant.wait_released(0.0 if hopeless else self._settings.timeout_s)
        self._stuck = None if free else occupant
        self._stats.busy_wait_s += time.perf_counter() - started_s
        if not free:
            held = f"slot {slot.index} still holds step {occupant.step}"
            if self._client.silent():
                reason = f"{held}, and {self._client.silence}"
            else:
                reason = (f"{held} after {self._settings.timeout_s:g} s: storage does not keep up, see "
                          f"{self._settings.saver}")  # fmt: skip
            self._give_up(slot, handle, "failed", reason)
        return free

    def _give_up(self, slot: Slot, handle: SaveHandle, outcome: Literal["skipped", "failed"], reason: str) -> None:
        self._end(handle, outcome, reason)
        index, step = slot.index, handle.step
        self._staging.after_copies(
            lambda: self._client.report(lambda seq: Skipped(seq=seq, slot=index, step=step, reason=reason))
        )

    def _begin(self, slot: Slot, handle: SaveHandle, record: SaveRecord) -> None:
        self._open[handle.step] = self._occupants[slot.index] = handle
        self._client.expect(handle.step)
        if self._lost is not None:  # said by the client's thread just now
            self._open.pop(handle.step, None)
            self._end(handle, "failed", self._lost)
            handle.release()
            return
        try:
            copy = self._staging.begin(slot, handle.step, self._record_maker(record), self._copied)
        except Exception as error:
            if not isinstance(error, CheckpointError):
                log.exception("step %d could not be staged", handle.step)
            self._fail(slot, handle, str(error) or repr(error))
        else:
            handle.begin(copy)

    def _record_maker(self, record: SaveRecord) -> MakeRecord:
        """Documents are taken now and encoded later. Ranks other than 0 write a record only if they have one of their
        own."""
        state, rank = self._plan.state, self._settings.rank
        documents = state.snapshot() if state is not None else dict

        def make() -> SaveRecord | None:
            found = documents() | (record.documents if rank == 0 else {})
            return msgspec.structs.replace(record, documents=found) if found or rank == 0 else None

        return make

    def _fail(self, slot: Slot, handle: SaveHandle, reason: str) -> None:
        """This rank could not stage: the others must not wait for it. The slot is free when the saver has settled."""
        self._end(handle, "failed", reason)
        index, step = slot.index, handle.step
        self._staging.after_copies(
            lambda: self._client.report(lambda seq: Failed(seq=seq, slot=index, step=step, reason=reason))
        )

    def _end(self, handle: SaveHandle, outcome: Literal["skipped", "failed"], reason: str) -> None:
        if handle.end(outcome, reason):
            self._stats.ended(handle)
            if outcome == "failed":
                self._failed.append(handle)
            log.log(logging.ERROR if outcome == "failed" else logging.WARNING,
                    "step %d was not saved (%s): %s", handle.step, outcome, reason)  # fmt: skip

    # --- called by the staging thread and the client's thread -----------------------------------------------------

    def _copied(self, copy: Copy) -> None:
        handle = self._open.get(copy.step)
        if copy.error is not None:
            expected = isinstance(copy.error, CheckpointError)
            if not expected:
                log.error("copying step %d failed", copy.step, exc_info=copy.error)
            if handle is not None:
                self._fail(copy.slot, handle, str(copy.error) if expected else f"the copy failed: {copy.error!r}")
            return
        if handle is not None:
            handle.copy_s = copy.copy_s
        slot, step, copy_s = copy.slot.index, copy.step, copy.copy_s
        self._client.report(lambda seq: Staged(seq=seq, slot=slot, step=step, copy_s=copy_s))

    def _settled(self, settled: Settled) -> None:
        self._client.unexpect(settled.step)
        handle = self._open.pop(settled.step, None)
        if handle is None:
            return
        if settled.outcome == "committed":
            # Whoever waits for the handle may go on at once: to restore it, or to save into its slot.
            self._committed = handle
            handle.release()
            handle.commit(settled)
            self._stats.ended(handle)
            if settled.reason:
                log.warning("step %d was saved, but %s (see %s)", handle.step, settled.reason, self._settings.saver)
        else:
            reason = settled.reason
            if settled.outcome == "failed":
                reason += f" (see {self._settings.saver})"
            self._end(handle, settled.outcome, reason)
        handle.release()

    def _on_lost(self, reason: str) -> None:
        """The saver has no run of ours any more: say it once, and let training go on without checkpoints."""
        if self._lost is not None or self._closed:
            return
        self._lost = f"{reason} (see {self._settings.saver}); attach again"
        log.error("no more checkpoints will be saved: %s", self._lost)
        for handle in list(self._open.values()):
            self._client.unexpect(handle.step)
            self._end(handle, "failed", self._lost)
            handle.release()
        self._open.clear()

    # --- restore and leave -----------------------------------------------------------------------------------------

    def _newest(self) -> Found | None:
        """What this run has committed last, else what lay there when it began: the same on every rank."""
        for handle in list(self._open.values()):
            handle.wait_released(self._settings.timeout_s)
        if self._committed is not None:
            return restoring.find(self._committed.step, self._settings.directory, self._staging.slots)
        if self._resume is None:
            return None
        image = Path(self._resume.image) if self._resume.image is not None else None
        return Found(self._settings.directory / checkpoint_name(self._resume.step), image)

    def _leave(self, copy_timeout_s: float | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._hook.remove()
        self._unhook_loading()
        self._staging.close(copy_timeout_s)
        self._client.close()
        atexit.unregister(self._at_exit)
        self._on_close()
        for handle in list(self._open.values()):
            if handle.end("failed", "the checkpointer was closed before the outcome was known; the saver goes on"):
                self._stats.ended(handle)
                log.warning("step %d: closed before its outcome was known; the saver goes on with it", handle.step)

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:
            self._leave(_LEAVE_S)
