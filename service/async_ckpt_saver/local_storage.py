"""Checkpoints in a directory of this host: made, tried, and held while something is written to it, so that it is below
the root."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import msgspec

from async_ckpt.core import manifest
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import checkpoint_name
from async_ckpt.core.retention_policy import Policy

from .datafile import StepHook
from .filesystem import fsync_directory
from .naming import rename_in
from .recovery import commit_once
from .retention import apply_policy
from .storage import Committed
from .temporaries import probe
from .writer import CommitJob, CommitResult, sweep

log = logging.getLogger(__name__)


class LocalStorage:
    """`storage.Storage` in `directory`, which must lie below `root` (absolute, resolved) once links are followed.

    A filesystem that hangs blocks the calling thread: there is no other way to wait for one.
    """

    far = False

    def __init__(self, directory: str, root: Path) -> None:
        self.directory = directory
        self._root = root
        self._newest: str | None = None  # what this run has committed last

    def prepare(self) -> Callable[[], None]:
        undo = prepare_directory(Path(self.directory), self._root)
        try:
            self.sweep()
        except BaseException:
            undo()
            raise
        return undo

    def sweep(self) -> None:
        if os.path.isdir(self.directory):
            with below_root(self.directory, self._root) as place:
                sweep(place)

    def commit_once(
        self, job: CommitJob, still_whole: Callable[[], bool], step_hook: StepHook = lambda name: None
    ) -> CommitResult:
        with below_root(self.directory, self._root) as place:
            lost = self._newest is not None and not os.path.lexists(os.path.join(place, self._newest))
            result = commit_once(msgspec.structs.replace(job, directory=place), still_whole, step_hook)
        notice = ""
        if lost:  # the path counts, whatever it means by now; but one run in two places must not go unnoticed
            notice = (f"{self._newest}, which this run committed before it, is not in {self.directory} any more: that "
                      f"was renamed or removed")  # fmt: skip
            log.error("%s", notice)
        self._newest = checkpoint_name(job.step)
        return msgspec.structs.replace(result, path=job.final, notice=notice)

    @contextlib.contextmanager
    def part_of_commit(self, name: str) -> Iterator[str]:
        """The directory in which another host's saver makes a checkpoint: within the block the path that is given means
        it, below `root`. Nothing is made. Raises CheckpointError where it cannot be seen, OSError."""
        with below_root(self.directory, self._root, make=False) as place:
            folder = os.path.join(place, name)
            try:
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                raise CheckpointError(
                    f"{os.path.join(self.directory, name)} is not there on {socket.gethostname()}, where the lead has "
                    f"made it: --shared-fs direct needs one filesystem at {self.directory} on every host; mount it, or "
                    f"leave the option out"
                ) from None
            try:
                yield f"/proc/self/fd/{fd}"
            except (OSError, CheckpointError) as error:
                rename_in(error, f"/proc/self/fd/{fd}", folder)
                raise
            finally:
                os.close(fd)

    def newest(self) -> tuple[int, str] | None:
        path = manifest.latest(self.directory)
        step = None if path is None else manifest.parse_step(path.name)
        return None if step is None else (step, str(path))

    def committed_by(self, run: str) -> list[Committed]:
        found = []
        for step, path in manifest.committed(self.directory):
            content = manifest.read_manifest(path)
            if content.run == run:
                found.append(Committed(step, str(path), content.total_bytes))
                self._newest = path.name
        return found

    def retain(self, policy: Policy, held: Collection[int] = ()) -> None:
        with below_root(self.directory, self._root) as place:
            apply_policy(place, policy, held)


def prepare_directory(directory: Path, root: Path) -> Callable[[], None]:
    """Make `directory`, prove that files can be made in it, and return what undoes the making.

    Raises CheckpointError with the path and the reason, also if it leads out of `root` once symbolic links are
    followed; then nothing that was not there before is left.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]

    def undo() -> None:
        for path in missing:  # deepest first; one that is not empty stays, and so do its parents
            with contextlib.suppress(OSError):
                path.rmdir()

    try:
        with below_root(str(directory), root) as place:
            probe(place)
    except OSError as error:
        undo()
        denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        advice = f"make it writable for uid {os.getuid()}, or choose another directory" if denied else (
            "choose another directory")  # fmt: skip
        raise CheckpointError(f"cannot write to {directory}: {error.strerror or error}: {advice}") from error
    return undo


@contextlib.contextmanager
def below_root(directory: str, root: Path, *, make: bool = True) -> Iterator[str]:
    """Within the block the path that is given means one directory below `root`, whatever is renamed, or replaced by a
    symbolic link, meanwhile: it leads through a descriptor, whose place is asked of the kernel when it is open.

    Missing directories are made, durably, and never through a link, if `make`. Raises CheckpointError if `directory`
    leads out of `root`, OSError for the rest. Errors that leave the block name `directory`.
    """
    fd = _open_below(directory, root, make=make)
    place = f"/proc/self/fd/{fd}"
    try:
        yield place
    except (OSError, CheckpointError) as error:
        rename_in(error, place, directory)
        raise
    finally:
        os.close(fd)


def _open_below(directory: str, root: Path, *, make: bool) -> int:
    present, missing = directory, list[str]()
    while True:
        try:
            fd = os.open(present, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            break
        except FileNotFoundError:
            if not make or os.path.lexists(present):  # a link to nowhere: what it means is not ours to make
                raise
            present, name = os.path.split(present)
            missing.insert(0, name)
    try:
        real = Path(os.readlink(f"/proc/self/fd/{fd}"), *missing)
        if ".." in missing or not real.is_relative_to(root):
            raise CheckpointError(f"{directory} leads to {real}, which is outside this saver's root {root}")
        for name in missing:
            with contextlib.suppress(FileExistsError):  # another commit has made it since
                os.mkdir(name, dir_fd=fd)
            fsync_directory(f"/proc/self/fd/{fd}")
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = inner
    except BaseException:
        os.close(fd)
        raise
    return fd
