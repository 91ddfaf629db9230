"""Directory operations with the guarantees that POSIX leaves to the caller."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
# What kernels and filesystems answer when they do not have an operation, as opposed to failing in it.
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
# What this process made and could not remove, by its directory: a path through a descriptor means another one later.
_unremoved: set[tuple[tuple[int, int], str]] = set()


def identity(directory: str | os.PathLike[str]) -> tuple[int, int]:
    """What stays the same whichever path leads to `directory`. Raises OSError."""
    info = os.stat(directory)
    return info.st_dev, info.st_ino


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make the entries of the directory `path` survive power loss.

    Raises OSError if the device fails. A filesystem that has no fsync for directories (some FUSE ones) is accepted:
    there is nothing further that could be asked of it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(fd)


def make_directories(path: str) -> None:
    """Make `path` and its missing parents, so that they survive power loss.

    Raises OSError; then the one whose name could not be made durable is gone again. Left there, the next call would
    find it and never sync its name, and a power loss would take every checkpoint in it.
    """
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for made in reversed(missing):
        try:
            os.mkdir(made)
        except FileExistsError:
            # Another commit may have made it since; anything but a directory is an error.
            if not os.path.isdir(made):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), made) from None
        try:
            fsync_directory(os.path.dirname(made))
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(made)
            raise


def rename_new(source: str, destination: str) -> None:
    """Rename without ever replacing anything, not even an empty directory.

    Raises FileExistsError if `destination` exists, OSError for the rest. Where the filesystem cannot do it in one
    operation (NFS, some FUSE), a check comes before the rename: only an empty directory made in between is replaced.
    """
    try:
        _renameat2(source, destination)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        if os.path.lexists(destination):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), destination) from None
        os.rename(source, destination)


def _renameat2(source: str, destination: str) -> None:
    """Python has no binding for it. Raises OSError(ENOSYS) where the C library has none either."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), source) from None
    arguments = (os.fsencode(source), _AT_FDCWD, os.fsencode(destination))
    if call(_AT_FDCWD, *arguments, ctypes.c_uint(_RENAME_NOREPLACE)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), source, None, destination)


def remove_tree(path: str) -> bool:
    """Delete a directory and all in it; what cannot be deleted is logged, never raised. True if all of it is gone."""
    directory, name = os.path.split(path)
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        with contextlib.suppress(OSError):
            _unremoved.add((identity(directory), name))
        logger.error(
            "%s could not be removed, its space stays taken until the next commit tries again: %s", path, error
        )
        return False
    if _unremoved:
        with contextlib.suppress(OSError):
            _unremoved.discard((identity(directory), name))
    return True


def remove_again(directory: str) -> None:
    """Delete what `remove_tree` could not delete in `directory`, since the filesystem itself had failed."""
    if not _unremoved:
        return
    with contextlib.suppress(OSError):
        here = identity(directory)
        for name in [name for where, name in _unremoved.copy() if where == here]:
            remove_tree(os.path.join(directory, name))
