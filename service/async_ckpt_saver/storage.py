"""What the saver asks of the place where checkpoints rest: one seam, and everything above it knows no other."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import msgspec

from async_ckpt.core.retention_policy import Policy

from .datafile import StepHook
from .writer import CommitJob, CommitResult


class Committed(msgspec.Struct, frozen=True):
    """A checkpoint that is there: `bytes` counts its files, the manifest left out."""

    step: int
    path: str
    bytes: int


class Storage(Protocol):
    """The checkpoints of one training directory. Every method blocks, so none is called in the saver's loop; several
    threads may be in one at a time.

    Whatever goes wrong is a CheckpointError or an OSError that says what to do. `far`: a network is between, and a
    method may take as long as the run's `timeout_s`.
    """

    directory: str
    far: bool

    def prepare(self) -> Callable[[], None]:
        """Make the place, prove that it takes files, and `sweep`. Returns what undoes the making: afterwards there is
        nothing that was not there before."""

    def sweep(self) -> None:
        """Bring it to the state that an unkilled saver leaves. What others are at work on is left alone."""

    def commit_once(
        self, job: CommitJob, still_whole: Callable[[], bool], step_hook: StepHook = lambda name: None
    ) -> CommitResult:
        """Write `job`, whose directory is ours; when this returns the checkpoint is whole and survives power loss.

        `still_whole` is asked when every byte has been read, before the checkpoint can be seen: False is a failure. A
        checkpoint that this very run has committed already counts. `step_hook` is told what is about to be done: a kind
        and a file, "write:model.safetensors". Raises CommitError, and then nothing can be seen.
        """

    def newest(self) -> tuple[int, str] | None:
        """Step and path of the newest committed checkpoint."""

    def committed_by(self, run: str) -> list[Committed]:
        """What that run has committed, in order of step. A damaged manifest is an error: it cannot be said whose."""

    def retain(self, policy: Policy, held: Collection[int] = ()) -> None:
        """Remove what no rule keeps; never the newest, nor the steps that are `held`. What cannot be removed is logged,
        and tried the next time."""
