"""A commit that may have been made already, by a saver that was killed before it could say so."""

from __future__ import annotations

from async_ckpt.core.manifest import read_manifest

from .writer import AlreadyCommittedError, CommitJob, CommitResult, commit, sweep


def commit_once(job: CommitJob) -> CommitResult:
    """Like `commit`, but a checkpoint that this very run committed counts: its name is made durable, `latest` moved.

    Raises CommitError, AlreadyCommittedError if the step was committed by another run.
    """
    try:
        return commit(job)
    except AlreadyCommittedError:
        found = read_manifest(job.final)
        if found.run != job.run or found.step != job.step:
            raise
        sweep(job.directory)
        total_bytes = sum(file.bytes for file in found.files.values())
        return CommitResult(path=job.final, bytes=total_bytes, write_s=0.0, commit_s=0.0, direct=False)
