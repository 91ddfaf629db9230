"""A commit that may have been made already, by a saver that was killed before it could say so."""

from __future__ import annotations

from collections.abc import Callable

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import read_manifest

from .datafile import StepHook
from .writer import AlreadyCommittedError, CommitJob, CommitResult, commit, sweep


def commit_once(
    job: CommitJob, still_whole: Callable[[], bool], step_hook: StepHook = lambda name: None
) -> CommitResult:
    """Like `commit`, but a checkpoint that this very run committed counts: its name is made durable, `latest` moved.

    `still_whole` is asked when every byte has been read, before the checkpoint gets its name: a rank says so in the
    slot's journal before it changes the first byte of it.
    Raises CommitError, AlreadyCommittedError if the step's name was taken by another run or another program.
    """

    def check(name: str) -> None:
        step_hook(name)
        if name == "rename" and not still_whole():
            raise CheckpointError(f"the slot of step {job.step} was taken by another step while it was read")

    try:
        return commit(job, step_hook=check)
    except AlreadyCommittedError as taken:
        try:
            found = read_manifest(job.final)
        except CheckpointError:
            raise taken from None
        if found.run != job.run or found.step != job.step:
            raise
        sweep(job.directory)
        return CommitResult(path=job.final, bytes=found.total_bytes, write_s=0.0, commit_s=0.0, direct=False)
