"""Hidden names that a commit or a removal works under, and which of them nobody works under any more."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator

from async_ckpt.core.errors import CheckpointError

from .filesystem import remove_tree

TRIES = 10
_NONCE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIRECTORY = re.compile(r"\.checkpoint-[0-9]{1,18}\.[A-Za-z0-9_-]{1,64}\.(tmp|trash)")
_LINK = re.compile(r"\.latest\.[A-Za-z0-9_-]{1,64}\.tmp")
_PROBE = re.compile(r"\.probe\.[A-Za-z0-9_-]{1,64}\.tmp")
# Names that this process is working under. A trainer that starts again makes the saver sweep its directory while the
# last step of its former life may still be on its way to disk.
_claimed: set[str] = set()


def new_nonce() -> str:
    return os.urandom(6).hex()


def probe(directory: str | os.PathLike[str]) -> None:
    """Prove that files can be made in `directory`. Raises OSError."""
    name = f".probe.{new_nonce()}.tmp"
    path = os.path.join(directory, name)
    with claim(name):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with contextlib.suppress(FileNotFoundError):  # swept by another saver
            os.unlink(path)


def is_temporary(name: str, step: int) -> bool:
    """Whether a commit of `step` works under it."""
    return _DIRECTORY.fullmatch(name) is not None and name.startswith(f".checkpoint-{step}.") and name.endswith(".tmp")


def check_nonce(nonce: str) -> None:
    """Raises CheckpointError if names with `nonce` would not be recognised as ours later."""
    if not _NONCE.fullmatch(nonce):
        raise CheckpointError(f"the nonce {nonce!r} is not allowed: give 1-64 letters, digits, '-' or '_'")


@contextlib.contextmanager
def claim(name: str) -> Iterator[None]:
    """Within the block, `leftovers` does not list `name`."""
    _claimed.add(name)
    try:
        yield
    finally:
        _claimed.discard(name)


@contextlib.contextmanager
def held(path: str) -> Iterator[None]:
    """Within the block other savers leave the directory alone: two of them may serve one run directory for a while.
    Raises OSError, FileNotFoundError if it is not there, or not any more."""
    fd = _hold(path)
    if fd is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def made_and_held(path: str) -> Iterator[None]:
    """A new directory, held; when the block fails it is removed, if it still has this name. Another saver that sweeps
    may take it in the instant before it is held: then it is made again.

    Raises OSError, also if it is there, and CheckpointError if it is taken away again and again.
    """
    fd = _make_and_hold(path)
    try:
        yield
    except BaseException:
        remove_tree(path)
        raise
    finally:
        os.close(fd)


def _make_and_hold(path: str) -> int:
    for _ in range(TRIES):
        os.mkdir(path)
        try:
            fd = _hold(path)
        except BaseException:
            remove_tree(path)
            raise
        if fd is not None:
            return fd
    raise CheckpointError(f"{path} cannot be made: somebody removes it again and again, as fast as it is made")


def _hold(path: str) -> int | None:
    """The descriptor that holds it; None if it is not there any more."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        with contextlib.suppress(OSError):  # a filesystem without locks
            fcntl.flock(fd, fcntl.LOCK_EX)  # whoever looks at it, or removes it, has it for an instant
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def remove_leftover(path: str) -> bool:
    """Remove a directory that `leftovers` has listed, unless somebody holds it by now. True if all of it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return remove_tree(path)  # a filesystem without locks
    else:
        return remove_tree(path)
    finally:
        os.close(fd)


def _is_held(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def leftovers(directory: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What bears our names in `directory` and is not claimed: directories, symbolic links, probes. Raises OSError."""
    with os.scandir(directory) as entries:
        return [entry for entry in entries if entry.name not in _claimed and _is_ours(entry)]


def _is_ours(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():
        return _LINK.fullmatch(entry.name) is not None
    if entry.is_file(follow_symlinks=False):
        return _PROBE.fullmatch(entry.name) is not None
    named = _DIRECTORY.fullmatch(entry.name) is not None and entry.is_dir(follow_symlinks=False)
    return named and not _is_held(entry.path)
