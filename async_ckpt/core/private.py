"""Directories and files that are for this user alone, whatever the umask and whoever came first."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import CheckpointError

_RACES = 100  # tries against savers that end just now


def private_directory(path: Path) -> Path:
    """Make `path` a directory that only this user can enter. Raises CheckpointError if it is someone else's."""
    info = _made(path)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise CheckpointError(
            f"{path} must be a directory of uid {os.getuid()} with mode 0700, but it has uid {info.st_uid} and mode "
            f"{stat.filemode(info.st_mode)}; remove it and try again"
        )
    return path


def _made(path: Path) -> os.stat_result:
    """Another saver that ends removes the directory it shares with us when that is empty: then it is made again."""
    for _ in range(_RACES):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            return path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{path} cannot be made: {error.strerror or error}") from error
    raise CheckpointError(f"{path} cannot be made: somebody removes it again and again")


def write_private(path: Path, data: bytes) -> None:
    """Whatever the umask, for this user alone; never through a symbolic link."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)


def read_capped(path: Path, limit_bytes: int) -> bytes:
    """All of a small file. Raises OSError, also if it is larger or a symbolic link."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise OSError(f"it has more than {limit_bytes} bytes")
    return data
