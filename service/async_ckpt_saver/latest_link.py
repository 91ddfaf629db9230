"""The symbolic link ``latest`` of a run's directory."""

from __future__ import annotations

import errno
import logging
import os
import threading

from async_ckpt.core.manifest import latest

from .datafile import StepHook
from .filesystem import fsync_directory, identity
from .temporaries import claim, new_nonce

logger = logging.getLogger(__name__)

LATEST = "latest"
# One for each directory: else a commit that looked for the newest checkpoint first could move the link last, and back.
# A lock for all would let the hung disk of one run hold up the others.
_locks: dict[tuple[int, int], threading.Lock] = {}


def point_latest(
    directory: str | os.PathLike[str], *, nonce: str | None = None, step_hook: StepHook = lambda name: None
) -> bool:
    """Make the symbolic link ``latest`` name the newest committed checkpoint, whichever it names now.

    So it never moves back while a newer one is valid. Only a symbolic link is ever replaced. Returns False, and logs
    why, if it could not be done.
    """
    link = os.path.join(directory, LATEST)
    try:
        with _locks.setdefault(identity(directory), threading.Lock()):
            newest = latest(directory)
            if newest is None or (os.path.islink(link) and os.readlink(link) == newest.name):
                return True
            if os.path.lexists(link) and not os.path.islink(link):
                problem = "is no symbolic link and was not made by async_ckpt: move it away"
                raise FileExistsError(errno.EEXIST, problem, link)
            _replace(link, newest.name, f".{LATEST}.{nonce or new_nonce()}.tmp", step_hook)
            step_hook("fsync-latest")
            fsync_directory(directory)
            step_hook("done")
    except Exception as error:
        logger.error("%s was not moved to the newest checkpoint: %s", link, error)
        return False
    return True


def _replace(link: str, target: str, temporary_name: str, step_hook: StepHook) -> None:
    temporary = os.path.join(os.path.dirname(link), temporary_name)
    with claim(temporary_name):
        step_hook("latest")
        os.symlink(target, temporary)
        try:
            step_hook("latest-replace")
            os.replace(temporary, link)
        except BaseException:
            os.unlink(temporary)
            raise
