"""What a user names on the command line: a training directory, or one checkpoint."""

from __future__ import annotations

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Location, Url, location_of


def checkpoint_directories(given: str) -> list[Location]:
    """`given` itself if it is a checkpoint, else every directory in it that bears a checkpoint's name, also one whose
    manifest is damaged. Raises CheckpointError if there is none."""
    from async_ckpt.core.manifest import MANIFEST_NAME, parse_step

    path = location_of(given)
    if (path / MANIFEST_NAME).exists() or (parse_step(path.name) is not None and path.is_dir()):
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: give a training directory, or a checkpoint in it")
    if isinstance(path, Url):
        names = path.folders()
    else:
        names = [each.name for each in path.iterdir() if each.is_dir() and not each.is_symlink()]
    found = sorted((step, path / name) for name in names if (step := parse_step(name)) is not None)
    if not found:
        raise CheckpointError(f"{path} holds no checkpoint: give the directory that attach was given")
    return [each for _, each in found]


def one_checkpoint(given: str) -> Location:
    """A checkpoint, or the newest of a training directory. Raises CheckpointError."""
    from async_ckpt.core.manifest import MANIFEST_NAME, latest

    path = location_of(given)
    if (path / MANIFEST_NAME).exists():
        return path
    newest = latest(path)
    if newest is None:
        raise CheckpointError(f"{path} is no checkpoint and holds none")
    return newest
