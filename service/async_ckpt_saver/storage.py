"""The run's directory before the first commit."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from async_ckpt.core.errors import CheckpointError

from .filesystem import make_directories


def prepare_directory(directory: Path, root: Path) -> Callable[[], None]:
    """Make `directory`, prove that files can be made in it, and return what undoes the making.

    Raises CheckpointError with the path and the reason, also if it leads out of `root` once symbolic links are
    followed; then nothing that was not there before is left.
    """
    if not directory.resolve().is_relative_to(root):
        raise CheckpointError(f"{directory} leads to {directory.resolve()}, which is outside this saver's root {root}")
    missing = [path for path in (directory, *directory.parents) if not path.exists()]

    def undo() -> None:
        for path in missing:  # deepest first; one that is not empty stays, and so do its parents
            with contextlib.suppress(OSError):
                path.rmdir()

    try:
        make_directories(str(directory))  # synced, so that what is committed into it survives a power loss
        fd, probe = tempfile.mkstemp(prefix=".async-ckpt-probe-", dir=directory)
        os.close(fd)
        os.unlink(probe)
    except OSError as error:
        undo()
        denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        advice = f"make it writable for uid {os.getuid()}, or choose another directory" if denied else (
            "choose another directory")  # fmt: skip
        raise CheckpointError(f"cannot write to {directory}: {error.strerror or error}: {advice}") from error
    return undo
