"""Readers hold a checkpoint, and who removes it looks whether it is held: one flock on its manifest, shared or not.

The kernel gives a lock back when its holder dies, and no file is left behind. A filesystem without flock (some FUSE
ones; Lustre mounted without `flock`) protects no reader, and says so in the log: restore from it while no retention
runs, or copy the checkpoint first. Linux NFS has it, between hosts too, since both sides open the file as its
byte-range locks want it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator

from .errors import CheckpointError
from .location import Url
from .manifest import MANIFEST_NAME

log = logging.getLogger(__name__)

_WAIT_S = 5.0  # for a removal that is under way; it holds the lock for one rename
_POLL_S = 0.01


class BeingRead(CheckpointError):
    """The checkpoint cannot be removed now: a reader holds it."""


@contextlib.contextmanager
def reading(checkpoint: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block no saver and no `gc` removes `checkpoint`. Without a manifest of ours nobody would.

    In an object store there is nothing to hold it by: there it can be removed while it is read, and reading fails then.
    Raises CheckpointError if it was removed just now.
    """
    if isinstance(checkpoint, Url):
        yield
        return
    path = os.path.join(checkpoint, MANIFEST_NAME)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield  # there is nothing to hold; whoever reads it will say what is missing
        return
    try:
        if _locked(fd, fcntl.LOCK_SH, _WAIT_S) is False:
            log.warning("%s is held by somebody who removes it; reading it all the same", checkpoint)
        if not _is_still(path, fd):
            raise CheckpointError(f"{checkpoint} was removed just now: restore another one")
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def removing(checkpoint: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block nobody begins to read `checkpoint`. Raises BeingRead if somebody does already, OSError if its
    manifest cannot be opened."""
    fd = os.open(os.path.join(checkpoint, MANIFEST_NAME), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if _locked(fd, fcntl.LOCK_EX, 0.0) is False:
            raise BeingRead(f"{checkpoint} is being read")
        yield
    finally:
        os.close(fd)


def is_read(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether `removing` would refuse now."""
    try:
        with removing(checkpoint):
            return False
    except BeingRead:
        return True
    except OSError:
        return False


def _locked(fd: int, kind: int, wait_s: float) -> bool | None:
    """False if another process holds it after `wait_s`, None if the filesystem has no such locks."""
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_POLL_S)
        except OSError as error:
            log.warning(
                "this filesystem has no flock (%s): checkpoints on it can be removed while they are read", error
            )
            return None
        else:
            return True


def _is_still(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except OSError:
        return False
