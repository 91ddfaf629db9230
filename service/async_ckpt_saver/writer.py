"""Commits an image: afterwards the checkpoint is on storage, whole and durable, or it is not there at all.

The order of system calls is the guarantee. Files go into a hidden directory beside the final one and are synced, the
manifest last, then every directory; one rename gives the whole its name; syncing the parent makes the name durable.
Only then is the symbolic link ``latest`` moved, so it never points at what a power loss could take back.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Protocol

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import (
    MANIFEST_NAME,
    Metric,
    check_path,
    checkpoint_name,
)
from async_ckpt.core.protocol import Settled

from .datafile import StepHook, Written, write_bytes, write_image_file
from .filesystem import fsync_directory, make_directories, remove_again, rename_new
from .image_maps import ImageMaps
from .latest_link import point_latest
from .manifest_writing import manifest_of, stops_in
from .temporaries import check_nonce, claim, leftovers, made_and_held, new_nonce, remove_leftover

logger = logging.getLogger(__name__)

_ADVICE = {
    errno.ENOSPC: "free some space there, or keep fewer checkpoints (keep_last=)",
    errno.EDQUOT: "raise the quota, or keep fewer checkpoints (keep_last=)",
    errno.EROFS: "make it writable again (`mount -o remount,rw`); a filesystem that turned read-only by itself has met "
    "an error, see `dmesg`",
    errno.EIO: "the device or its filesystem fails, see `dmesg`",
}


class Parts(Protocol):
    """Files `paths` of a checkpoint that this host and others write together."""

    @property
    def paths(self) -> Sequence[str]: ...

    def write(self, image: str, temporary: str, hashing: Executor, step_hook: StepHook) -> dict[str, Written]:
        """All of them, into the hidden directory `temporary`, which has their folders: returns when every host has made
        its part durable. Raises CheckpointError or OSError if one of them has not."""


class CommitJob(msgspec.Struct, frozen=True):
    """One checkpoint to commit.

    `directory` is the run's, absolute and resolved. `image` is a slot's directory, whose `files` (relative paths) are
    taken as they are; `documents` are the small files of this save that are not in the image. The rest is for the
    manifest. The image must not change until `commit` has returned. `timeout_s` bounds what can be waited for in vain:
    an object store. `original`: the image is a checkpoint that was committed elsewhere, and these are the bytes of its
    manifest; the copy gets the same ones, and is committed only if its files are what they say. `parts`: the image has
    holes, which other hosts write. `maps`: of the run that has the image.
    """

    directory: str
    step: int
    image: str
    files: tuple[str, ...]
    documents: dict[str, bytes] = {}
    metrics: dict[str, Metric] = {}
    extra: Any = None
    world: int = 1
    versions: dict[str, str] = {}
    run: str = ""
    timeout_s: float = 600.0
    original: bytes = b""
    parts: Parts | None = None
    maps: ImageMaps | None = None

    @property
    def final(self) -> str:
        return os.path.join(self.directory, checkpoint_name(self.step))


class CommitResult(msgspec.Struct, frozen=True):
    """A durable checkpoint at `path`.

    `bytes` counts its files, the manifest left out. `write_s` is the time to write and sync them, `commit_s` that of
    manifest, directories, rename and `latest`. `direct`: every large file bypassed the page cache, and there was one.
    `latest_moved` is False if the symbolic link could not be updated, which is logged and harms no reader of ours.
    `notice` is something else that whoever saved it should know.
    """

    path: str
    bytes: int
    write_s: float
    commit_s: float
    direct: bool
    latest_moved: bool = True
    notice: str = ""

    def settled(self, step: int, slot: int) -> Settled:
        """What the ranks are told of it."""
        return Settled(
            step=step,
            slot=slot,
            outcome="committed",
            path=self.path,
            bytes=self.bytes,
            write_s=self.write_s,
            commit_s=self.commit_s,
            reason=self.notice if self.latest_moved else "`latest` could not be moved to it",
        )


class CommitError(CheckpointError):
    """No checkpoint was committed, and nothing of the attempt is under its name. `reason` says why, in one line;
    `errno` is the system's code if a system call failed, else None."""

    def __init__(self, reason: str, code: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.errno = code


class AlreadyCommittedError(CommitError):
    """The final name is taken; what lies there was not touched. It may be this very step, committed by a saver that
    was killed before it could say so: `async_ckpt.core.manifest.read_manifest` tells."""


def commit(job: CommitJob, *, nonce: str | None = None, step_hook: StepHook = lambda name: None) -> CommitResult:
    """Write `job` to storage; when this returns, the checkpoint survives power loss.

    `nonce` tells attempts apart and must be new for each; left out, a random one is taken. `step_hook` is called with
    a name before each system call that matters ("mkdir", "write:<path>", "chunk:<path>", "fsync:<path>", "manifest",
    "fsync-directory:<path>", "rename", "fsync-parent", "latest", ...).

    Raises CommitError (AlreadyCommittedError if the step has a directory already), and only that. Then the attempt
    is removed from the disk and nothing of it is under the final name. That holds even when the rename succeeded and
    only syncing the parent failed: the checkpoint is withdrawn. Left there, retention could count it as the newest
    and delete durable ones for the sake of a name that a power loss undoes, and ranks told "failed" would resume from
    it. Nothing is synced twice: after a failed fsync the kernel may report success for pages that it dropped.
    A failure to move `latest` comes after the checkpoint is durable: it is logged and the commit stands.
    """
    nonce = new_nonce() if nonce is None else nonce
    try:
        _check(job, nonce)
        with _temporary_directory(job, nonce, step_hook) as temporary:
            result = _fill_and_publish(job, temporary, step_hook)
    except Exception as error:
        raise _commit_error(job, error) from error
    started_s = time.perf_counter()
    moved = point_latest(job.directory, nonce=nonce, step_hook=step_hook)
    commit_s = result.commit_s + time.perf_counter() - started_s
    return msgspec.structs.replace(result, commit_s=commit_s, latest_moved=moved)


def sweep(directory: str | os.PathLike[str]) -> list[str]:
    """Bring `directory` to the state that an unkilled saver leaves. Returns the names removed.

    Removes our ``.tmp`` and ``.trash`` names that no commit of this process is using, never anything else; makes
    durable what was renamed but not yet synced, so every checkpoint visible afterwards may be relied on; moves
    ``latest`` to the newest. No other process may be committing there. Does nothing if `directory` does not exist.
    Raises CheckpointError if it cannot be listed or synced.
    """
    if not os.path.isdir(directory):
        return []
    removed = []
    try:
        for entry in leftovers(directory):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                removed.append(entry.name)
            elif remove_leftover(entry.path):
                removed.append(entry.name)
        fsync_directory(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be swept: {error}") from error
    point_latest(directory)
    return removed


@contextlib.contextmanager
def _temporary_directory(job: CommitJob, nonce: str, step_hook: StepHook) -> Iterator[str]:
    """A new hidden directory beside the final one; removed, if it still has this name, when the block fails."""
    name = f".{checkpoint_name(job.step)}.{nonce}.tmp"
    path = os.path.join(job.directory, name)
    if os.path.lexists(job.final):
        # Refused again at the rename; here it saves writing everything first.
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), job.final)
    step_hook("mkdir")
    make_directories(job.directory)
    remove_again(job.directory)  # its space may be wanted
    with claim(name), made_and_held(path):
        yield path


def _fill_and_publish(job: CommitJob, temporary: str, step_hook: StepHook) -> CommitResult:
    started_s = time.perf_counter()
    written = _write_files(job, temporary, step_hook)
    written_s = time.perf_counter()
    _write_manifest(job, temporary, written, step_hook)
    for directory in _directories(temporary, written):
        step_hook(f"fsync-directory:{os.path.relpath(directory, temporary)}")
        fsync_directory(directory)
    step_hook("rename")
    _check_there(temporary, written)
    rename_new(temporary, job.final)
    try:
        step_hook("fsync-parent")
        fsync_directory(job.directory)
    except BaseException:
        _withdraw(job.final, temporary)
        raise
    large = [file.direct for file in written.values() if file.direct is not None]
    return CommitResult(
        path=job.final,
        bytes=sum(file.entry.bytes for file in written.values()),
        write_s=written_s - started_s,
        commit_s=time.perf_counter() - written_s,
        direct=bool(large) and all(large),
    )


def _write_files(job: CommitJob, temporary: str, step_hook: StepHook) -> dict[str, Written]:
    written: dict[str, Written] = {}
    stops = stops_in(job)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash") as hashing:
        if job.parts is not None:
            for path in job.parts.paths:
                _destination(temporary, path)
            written |= job.parts.write(job.image, temporary, hashing, step_hook)
        for path in (path for path in job.files if path not in written):
            destination = _destination(temporary, path)
            step_hook(f"write:{path}")
            written[path] = write_image_file(
                job.image, path, destination, hashing, step_hook, stops.get(path), job.maps
            )
    for path, data in job.documents.items():
        destination = _destination(temporary, path)
        step_hook(f"write:{path}")
        written[path] = write_bytes(data, path, destination, step_hook)
    return written


def _write_manifest(job: CommitJob, temporary: str, written: dict[str, Written], step_hook: StepHook) -> None:
    data = manifest_of(job, written)
    step_hook("manifest")
    write_bytes(data, MANIFEST_NAME, os.path.join(temporary, MANIFEST_NAME), step_hook)


def _check_there(temporary: str, written: dict[str, Written]) -> None:
    """Somebody may be removing the directory that we write to. Raises OSError naming the first file that is gone."""
    for path, file in written.items():
        destination = os.path.join(temporary, path)
        if os.stat(destination).st_size != file.entry.bytes:
            raise CheckpointError(f"{destination} was changed by another program while it was written")


def _withdraw(final: str, temporary: str) -> None:
    """Take back a name that is not durable."""
    try:
        rename_new(final, temporary)
    except FileNotFoundError:
        return  # somebody has removed it, or the whole directory
    except OSError as error:
        # Its content is whole, so nobody who reads it is harmed; that it is there has to be said.
        raise CheckpointError(f"syncing the directory failed and {final} could not be withdrawn: {error}") from error
    with contextlib.suppress(OSError):
        fsync_directory(os.path.dirname(final))


def _check(job: CommitJob, nonce: str) -> None:
    check_nonce(nonce)
    for name, directory in (("directory", job.directory), ("image", job.image)):
        if not os.path.isabs(directory):
            raise CheckpointError(f"the {name} {directory!r} is not an absolute path")
    check_files(job)


def check_files(job: CommitJob) -> None:
    """Raises CheckpointError for a checkpoint of nothing, and for names that lead out or are given twice."""
    paths = [check_path(path) for path in (*job.files, *job.documents)]
    if not paths:
        raise CheckpointError("a checkpoint without files is not a checkpoint: name at least one file")
    if len(set(paths)) != len(paths):
        twice = sorted(path for path in set(paths) if paths.count(path) > 1)
        raise CheckpointError(f"{twice} would be written twice into one checkpoint")


def _destination(temporary: str, path: str) -> str:
    """Where `path` goes. Makes what is missing below `temporary`, never that itself: if somebody has removed it, the
    files written so far are gone, and the next one must fail."""
    directory = temporary
    for component in path.split("/")[:-1]:
        directory = os.path.join(directory, component)
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory)
    return os.path.join(temporary, path)


def _directories(temporary: str, paths: dict[str, Written]) -> list[str]:
    """Every directory of the checkpoint, children before parents."""
    found = {temporary}
    for path in paths:
        while path := os.path.dirname(path):
            found.add(os.path.join(temporary, path))
    return sorted(found, key=len, reverse=True)


def _commit_error(job: CommitJob, error: Exception) -> CommitError:
    subject = f"step {job.step} was not committed to {job.directory}"
    if isinstance(error, FileExistsError) and job.final in (error.filename, error.filename2):
        return AlreadyCommittedError(f"{subject}: {job.final} exists already", error.errno)
    code: int | None = getattr(error, "errno", None)  # of this host, or of another that has written its part
    known = isinstance(error, (OSError, CheckpointError))
    advice = f": {_ADVICE[code]}; the next save tries again" if code in _ADVICE else ""
    return CommitError(f"{subject}: {error if known else repr(error)}{advice}", code)
