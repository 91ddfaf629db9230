"""What may go from a training directory: what crashes left, and checkpoints that no rule keeps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.holding import BeingRead, is_read
from async_ckpt.core.location import Location, Url
from async_ckpt.core.manifest import checkpoint_name
from async_ckpt.core.retention_policy import Policy

from .latest_link import LATEST, point_latest
from .retention import expired, metrics_of, remove
from .temporaries import leftovers, remove_leftover

IS_READ = "is being read"
IS_NEW = "nothing in it: a saver may have made it just now; the next attach removes it if not"
NOT_MOVED = "cannot be moved to the newest checkpoint; the line before says why"
LEFT_ALONE = (IS_READ, IS_NEW)


class Removal(msgspec.Struct, frozen=True):
    """One name in the directory. `done` False with a `reason` why it stays, or because this was only a rehearsal."""

    name: str
    bytes: int
    kind: str  # "leftover" or "checkpoint"; "link" if `latest` could not be moved
    done: bool
    reason: str = ""


def collect(
    directory: Location, policy: Policy, *, dry_run: bool, progress: Callable[[Removal], None] = lambda removal: None
) -> list[Removal]:
    """Remove leftovers of commits whose saver is gone, then apply `policy`; the newest checkpoint always stays.

    A saver may be at work in `directory` meanwhile: what it works under, and what a reader holds, is left alone.
    Raises CheckpointError if `directory` cannot be listed.
    """
    if isinstance(directory, Url):
        from .object_collection import collect_objects

        return collect_objects(directory, policy, dry_run=dry_run, progress=progress)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: give the one that attach was given")
    removals = []

    def note(removal: Removal) -> None:
        removals.append(removal)
        progress(removal)

    for entry in _leftovers(directory):
        size_bytes = tree_bytes(entry.path)
        if _may_be_new(entry):
            note(Removal(entry.name, size_bytes, "leftover", False, IS_NEW))
        else:
            note(Removal(entry.name, size_bytes, "leftover", not dry_run and remove_leftover(entry.path)))
    for step in expired(metrics_of(directory), policy):
        note(_expire(directory, step, dry_run))
    if not dry_run and not point_latest(directory):
        note(Removal(LATEST, 0, "link", False, NOT_MOVED))
    return removals


def tree_bytes(path: str | os.PathLike[str]) -> int:
    """The lengths of all files below `path`; what vanishes meanwhile does not count."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total


def _leftovers(directory: Path) -> list[os.DirEntry[str]]:
    try:
        return leftovers(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed: {error.strerror or error}") from error


def _may_be_new(entry: os.DirEntry[str]) -> bool:
    """A link, or a directory with nothing in it: a saver makes them an instant before it moves or locks them. They take
    no space, and no clock could tell their age for certain."""
    try:
        return entry.is_symlink() or not os.listdir(entry.path)
    except OSError:
        return True  # gone already


def _expire(directory: Path, step: int, dry_run: bool) -> Removal:
    name = checkpoint_name(step)
    size_bytes = tree_bytes(directory / name)
    try:
        if dry_run:
            reason = IS_READ if is_read(directory / name) else ""
            return Removal(name, size_bytes, "checkpoint", False, reason)
        remove(directory, step)
    except BeingRead:
        return Removal(name, size_bytes, "checkpoint", False, IS_READ)
    except CheckpointError as error:
        return Removal(name, size_bytes, "checkpoint", False, str(error))
    return Removal(name, size_bytes, "checkpoint", True)
