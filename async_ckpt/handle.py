"""The future of one save."""

from __future__ import annotations

import time
from typing import Literal

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Location
from async_ckpt.core.manifest import checkpoint_name
from async_ckpt.core.protocol import Settled, Uploaded
from async_ckpt.core.slots import Phase

from .latch import Latch
from .staging import Copy
from .upload import Upload

State = Literal["staging", "staged", "committed", "skipped", "failed"]
_POLL_S = 0.001


class SaveHandle:
    """One save: "staging" -> "staged" (every rank's bytes are in shared memory) -> "committed", "skipped" or "failed".

    `stall_s`: what this save has cost the training thread so far, the wait at the next optimizer step included. Known
    once it has happened, None before: `copy_s` (this rank's copy), `write_s` and `commit_s` (the saver's), `bytes`.
    """

    def __init__(self, step: int, directory: Location, timeout_s: float, *, relayed: bool = False) -> None:
        """`relayed`: what ranks of other hosts have staged is not seen from here."""
        self.step = step
        self._relayed = relayed
        self.stall_s = 0.0
        self.started_s = time.perf_counter()
        self.copy_s: float | None = None
        self.write_s: float | None = None
        self.commit_s: float | None = None
        self.bytes: int | None = None
        self._directory = directory
        self._timeout_s = timeout_s
        self._copy: Copy | None = None
        self._final: State | None = None
        self._reason = ""
        self._reported = False
        self._ended = Latch()
        self._released = Latch()
        self._upload: Upload | None = None

    def __repr__(self) -> str:
        return f"<SaveHandle step={self.step} {self.state}>"

    @property
    def state(self) -> State:
        if self._final is not None:
            return self._final
        return "staged" if self._staged_everywhere() else "staging"

    def staged(self, timeout_s: float | None = None) -> None:
        """Return when the checkpoint survives the death of every trainer: all ranks have staged it, and what those of
        other hosts have staged has arrived on rank 0's. Other hosts know that only once it is committed.

        Raises CheckpointError if the save failed or was skipped, or after `timeout_s` (default: attach's).
        """
        deadline_s = time.monotonic() + self._limit_s(timeout_s)
        if self._copy is not None:
            self._copy.done.wait(self._limit_s(timeout_s))
        while self.state == "staging":
            if time.monotonic() > deadline_s:
                raise self._too_late("staged by every rank", timeout_s)
            time.sleep(_POLL_S)
        self._raise_if_lost()

    def wait(self, timeout_s: float | None = None) -> Location:
        """Return the committed directory, `<directory>/checkpoint-<step>`: it survives a power loss. A `Path`, or a
        `Url` (text) where the directory is one.

        Raises CheckpointError if the save failed or was skipped, or after `timeout_s` (default: attach's).
        """
        if not self._ended.wait(self._limit_s(timeout_s)):
            raise self._too_late("committed", timeout_s)
        self._raise_if_lost()
        return self._directory / checkpoint_name(self.step)

    def uploaded(self, timeout_s: float | None = None) -> str:
        """Return the URL of the copy in the second tier, when that is committed there: it survives the loss of this
        host.

        Raises CheckpointError if the save or the upload failed, if a newer checkpoint was uploaded in its stead, or
        after `timeout_s` (default: attach's); the upload goes on then.
        """
        if self._upload is None:
            raise CheckpointError(f"step {self.step} has no second tier to go to: give attach(tiers=[first, second])")
        deadline_s = time.monotonic() + self._limit_s(timeout_s)
        path = self.wait(timeout_s)
        return self._upload.wait(max(0.0, deadline_s - time.monotonic()), path, self._limit_s(timeout_s))

    # --- for the checkpointer --------------------------------------------------------------------------------------

    def begin(self, copy: Copy) -> None:
        self._copy = copy

    def expect_upload(self) -> None:
        self._upload = Upload()

    def end_upload(self, uploaded: Uploaded) -> bool:
        """The first end counts; True if this is it."""
        return self._upload is not None and self._upload.end(uploaded)

    def commit(self, settled: Settled) -> None:
        self.bytes, self.write_s, self.commit_s = settled.bytes, settled.write_s, settled.commit_s
        self.end("committed", "")

    def end(self, state: State, reason: str) -> bool:
        """The first end counts; True if this is it."""
        if self._final is not None:
            return False
        self._reason, self._final = reason, state
        self._ended.set()
        return True

    def release(self) -> None:
        """The saver is done with the slot."""
        self._released.set()

    @property
    def released(self) -> bool:
        """The slot may be written again: the saver is done with it, and so is our own copy."""
        return self._released.is_set() and (self._copy is None or self._copy.done.is_set())

    def wait_released(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        if not self._released.wait(timeout_s):
            return False
        return self._copy is None or self._copy.done.wait(max(0.0, deadline_s - time.monotonic()))

    def _staged_everywhere(self) -> bool:
        copy = self._copy
        if copy is None or not copy.done.is_set() or copy.error is not None:
            return False
        try:
            return copy.slot.state.complete_step() == self.step
        except ValueError:  # the slot was unmapped: the checkpointer is closed
            return False

    @property
    def failed_unnoticed(self) -> bool:
        """The save failed, and nobody has been told by an exception."""
        return self._final == "failed" and not self._reported

    def _raise_if_lost(self) -> None:
        if self._final in ("failed", "skipped"):
            self._reported = True
            raise CheckpointError(f"step {self.step} was not saved ({self._final}): {self._reason}")

    def _limit_s(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else timeout_s

    def _too_late(self, what: str, timeout_s: float | None) -> CheckpointError:
        missing = [] if self._relayed else self._not_staged()
        if missing:
            names = ", ".join(map(str, missing[:8]))
            more = f"rank {names} has not staged it: every rank must call save with the same steps"
        else:
            more = f"it is {self.state} and goes on"
        return CheckpointError(f"step {self.step} is not {what} after {self._limit_s(timeout_s):g} s; {more}")

    def _not_staged(self) -> list[int]:
        copy = self._copy
        if copy is None or not copy.done.is_set() or self._final is not None:
            return []
        try:
            cells = [copy.slot.state.cell(rank) for rank in range(copy.slot.state.world)]
        except ValueError:
            return []
        return [rank for rank, cell in enumerate(cells) if (cell.phase, cell.step) != (Phase.STAGED, self.step)]
