"""Saves under way on this rank: from a free slot to the outcome that the saver tells."""

from __future__ import annotations

import logging
import time
from typing import Literal

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_UNSETTLED
from async_ckpt.core.protocol import Failed, SaveRecord, Settled, Skipped, Staged, Uploaded

from .handle import SaveHandle
from .joined import Joined, Settings
from .mapped import Slot
from .staging import Copy, MakeRecord
from .stats import Stats
from .trace import Trace

log = logging.getLogger(__name__)


class Saves:
    """Every save gets a handle, and every handle an end; no failure after `start` is an exception.

    `open`: step -> handle, until the saver has settled it. `last`: the latest one. `committed`: the latest that was.
    `lost`: why no save can succeed any more.
    """

    def __init__(self, settings: Settings, joined: Joined, trace: Trace | None = None) -> None:
        self.stats = Stats()
        self.open: dict[int, SaveHandle] = {}
        self.last: SaveHandle | None = None
        self.committed: SaveHandle | None = None
        self.lost: str | None = None
        self._settings = settings
        self._trace = trace
        self._stuck: SaveHandle | None = None  # the occupant of a slot that was waited for in vain
        self._failed: list[SaveHandle] = []  # since take_failed()
        self._uploading: dict[int, SaveHandle] = {}  # step -> committed, and on its way to the second tier
        self.use(joined)

    def use(self, joined: Joined) -> None:
        """Go on in this run, whose slots are all free."""
        self._plan, self._staging, self._client = joined.plan, joined.staging, joined.client
        self._relayed = joined.hosts is not None and joined.hosts.relayed
        self._calls = 0
        self._occupants: dict[int, SaveHandle] = {}  # slot -> the last save that went into it
        self._ask_for_uploads()

    def start(self, record: SaveRecord, *, when_busy: Literal["wait", "skip"]) -> SaveHandle:
        """Start copying into the next slot, after `when_busy` if another save is still in it."""
        slot = self._staging.slots[self._calls % len(self._staging.slots)]
        self._calls += 1  # also when skipped: all ranks must go through the slots in step
        handle = self._new(record.step)
        if self.lost is not None:
            self._end(handle, "failed", self.lost)
        elif self._slot_free(slot, handle, when_busy):
            self._begin(slot, handle, record)
        return handle

    def skip(self, step: int, reason: str) -> SaveHandle:
        """A save that no rank makes."""
        handle = self._new(step)
        self._end(handle, "skipped", reason)
        return handle

    def release(self, timeout_s: float) -> None:
        """Wait until the saver is done with everything; what it does not settle in time has failed."""
        for handle in list(self.open.values()):
            if not handle.wait_released(timeout_s):
                self._end(handle, "failed", f"not settled after {timeout_s:g} s")
        self.open.clear()

    def take_failed(self) -> list[SaveHandle]:
        """Those that failed since the last call."""
        failed, self._failed = self._failed, []
        return failed

    # --- one save --------------------------------------------------------------------------------------------------

    def _new(self, step: int) -> SaveHandle:
        self.stats.saves += 1
        self.last = SaveHandle(step, self._settings.given, self._settings.timeout_s, relayed=self._relayed)
        if self._settings.second is not None:
            self.last.expect_upload()
        return self.last

    def _slot_free(self, slot: Slot, handle: SaveHandle, when_busy: Literal["wait", "skip"]) -> bool:
        """Wait for the slot as `when_busy` says. If it stays busy, `handle` is ended and the other ranks are told."""
        occupant = self._occupants.get(slot.index)
        if occupant is None or occupant.released:
            return True
        if when_busy == "skip":
            self._give_up(slot, handle, "skipped", f"slot {slot.index} still holds step {occupant.step}")
            return False
        started_s = time.perf_counter()
        # Once waited for in vain, and nothing heard of the saver since: every save would cost the whole timeout.
        hopeless = occupant is self._stuck and self._client.pulse.silent()
        free = occupant.wait_released(0.0 if hopeless else self._settings.timeout_s)
        self._stuck = None if free else occupant
        self.stats.busy_wait_s += time.perf_counter() - started_s
        if self._trace is not None:
            self._trace.called("wait for slot", handle.step, started_s)
        if not free:
            held = f"slot {slot.index} still holds step {occupant.step}"
            if self._client.pulse.silent():
                reason = f"{held}, and {self._client.pulse.silence}"
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
        self.open[handle.step] = self._occupants[slot.index] = handle
        self._client.expect(handle.step)
        if self.lost is not None:  # said by the client's thread just now
            self.open.pop(handle.step, None)
            self._end(handle, "failed", self.lost)
            handle.release()
            return
        if self._trace is not None:
            self._trace.began(handle.step, slot.index)
        try:
            copy = self._staging.begin(slot, handle.step, self._record_maker(record), self._copied)
        except Exception as error:
            if not isinstance(error, CheckpointError):
                log.exception("step %d could not be staged", handle.step)
            if self._trace is not None:
                self._trace.not_begun(handle.step)
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
            self.stats.ended(handle)
            if outcome == "failed":
                self._failed.append(handle)
            if self._trace is not None:
                self._trace.not_saved(handle.step, outcome, reason)
            log.log(logging.ERROR if outcome == "failed" else logging.WARNING,
                    "step %d was not saved (%s): %s", handle.step, outcome, reason)  # fmt: skip

    # --- called by the staging thread and the client's thread -----------------------------------------------------

    def _copied(self, copy: Copy) -> None:
        handle = self.open.get(copy.step)
        if self._trace is not None:
            error = None if copy.error is None else str(copy.error) or repr(copy.error)
            self._trace.copied(copy.step, copy.started_s, copy.ended_s, error)
        if copy.error is not None:
            expected = isinstance(copy.error, CheckpointError)
            if not expected:
                log.error("copying step %d failed", copy.step, exc_info=copy.error)
            if handle is not None:
                self._fail(copy.slot, handle, str(copy.error) if expected else f"the copy failed: {copy.error!r}")
            return
        stall_s = 0.0
        if handle is not None:
            handle.copy_s = copy.copy_s
            stall_s = self._stall_s(handle)
        slot, step, copy_s = copy.slot.index, copy.step, copy.copy_s
        self._client.report(lambda seq: Staged(seq=seq, slot=slot, step=step, copy_s=copy_s, stall_s=stall_s))

    def _stall_s(self, handle: SaveHandle) -> float:
        """What the save has cost the training thread, which may be in `save` still, or at the fence."""
        now_s, fenced_since_s = time.perf_counter(), self._staging.fenced_since_s
        in_save_s = handle.stall_s or now_s - handle.started_s
        return in_save_s + (now_s - fenced_since_s if fenced_since_s is not None else 0.0)

    def settled(self, settled: Settled) -> None:
        """The saver says how a step has ended."""
        self._client.unexpect(settled.step)
        handle = self.open.pop(settled.step, None)
        if handle is None:
            return
        if self._trace is not None:
            self._trace.settled(settled)
        if settled.outcome == "committed":
            # Whoever waits for the handle may go on at once: to restore it, or to save into its slot.
            self.committed = handle
            if self._settings.second is not None:
                self._uploading[handle.step] = handle
                self._ask_for_uploads()
            handle.release()
            handle.commit(settled)
            self.stats.ended(handle)
            if settled.reason:
                log.warning("step %d was saved, but %s (see %s)", handle.step, settled.reason, self._settings.saver)
        else:
            reason = settled.reason
            if settled.outcome == "failed":
                reason += f" (see {self._settings.saver})"
            self._end(handle, settled.outcome, reason)
        handle.release()

    def uploaded(self, uploaded: Uploaded) -> None:
        """The saver says what became of an upload."""
        handle = self._uploading.pop(uploaded.step, None)
        if handle is None:
            return
        self._ask_for_uploads()
        self._end_upload(handle, uploaded)

    def leave(self) -> None:
        """Nobody listens to the saver any more."""
        for handle in list(self.open.values()):
            if handle.end("failed", "the checkpointer was closed before the outcome was known; the saver goes on"):
                self.stats.ended(handle)
                log.warning("step %d: closed before its outcome was known; the saver goes on with it", handle.step)
        self._lose_uploads("the checkpointer was closed before the outcome was known; the saver goes on")

    def _ask_for_uploads(self) -> None:
        self._client.not_uploaded = sorted(self._uploading)[-MAX_UNSETTLED:]

    def _end_upload(self, handle: SaveHandle, uploaded: Uploaded) -> None:
        if not handle.end_upload(uploaded):
            return
        if uploaded.outcome == "uploaded":
            self.stats.uploaded += 1
        else:
            self.stats.not_uploaded += 1
            log.log(logging.ERROR if uploaded.outcome == "failed" else logging.WARNING,
                    "step %d is committed, but was not uploaded (%s): %s",
                    handle.step, uploaded.outcome, uploaded.reason)  # fmt: skip

    def _lose_uploads(self, reason: str) -> None:
        for step in list(self._uploading):
            self._uploading.pop(step).end_upload(Uploaded(step=step, outcome="failed", reason=reason))

    def lose(self, reason: str) -> None:
        """The saver has no run of ours any more: say it once, and let training go on without checkpoints."""
        if self.lost is not None:
            return
        self.lost = f"{reason} (see {self._settings.saver}); attach again"
        log.error("no more checkpoints will be saved: %s", self.lost)
        self._lose_uploads(self.lost)
        for handle in list(self.open.values()):
            self._client.unexpect(handle.step)
            self._end(handle, "failed", self.lost)
            handle.release()
        self.open.clear()
