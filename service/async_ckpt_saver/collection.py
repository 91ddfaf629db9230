"""What may go from a training directory: what crashes left, and checkpoints that no rule keeps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.holding import BeingRead, is_read
from async_ckpt.core.manifest import checkpoint_name
from async_ckpt.core.retention_policy import Policy

from .filesystem import remove_tree
from .latest_link import point_latest
from .retention import expired, metrics_of, remove
from .temporaries import leftovers

_SETTLE_S = 60.0  # a saver makes a directory, or a link, an instant before it holds or moves it


class Removal(msgspec.Struct, frozen=True):
    """One name in the directory. `done` False with a `reason` why it stays, or because this was only a rehearsal."""

    name: str
    bytes: int
    kind: str  # "leftover" or "checkpoint"
    done: bool
    reason: str = ""


def collect(
    directory: Path, policy: Policy, *, dry_run: bool, progress: Callable[[Removal], None] = lambda removal: None
) -> list[Removal]:
    """Remove leftovers of commits whose saver is gone, then apply `policy`; the newest checkpoint always stays.

    A saver may be at work in `directory` meanwhile: what it works under, and what a reader holds, is left alone.
    Raises CheckpointError if `directory` cannot be listed.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: give the one that attach was given")
    removals = []

    def note(removal: Removal) -> None:
        removals.append(removal)
        progress(removal)

    for entry in _abandoned(directory):
        size_bytes = tree_bytes(entry.path)
        note(Removal(entry.name, size_bytes, "leftover", not dry_run and _gone(entry)))
    for step in expired(metrics_of(directory), policy):
        note(_expire(directory, step, dry_run))
    if not dry_run:
        point_latest(directory)
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


def _abandoned(directory: Path) -> list[os.DirEntry[str]]:
    try:
        found = leftovers(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed: {error.strerror or error}") from error
    return [entry for entry in found if not _may_be_new(entry)]


def _may_be_new(entry: os.DirEntry[str]) -> bool:
    """A link, or a directory with nothing in it, that somebody may have made an instant ago."""
    try:
        young = time.time() - entry.stat(follow_symlinks=False).st_mtime < _SETTLE_S
        return young and (entry.is_symlink() or not os.listdir(entry.path))
    except OSError:
        return True  # gone already


def _gone(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return remove_tree(entry.path)
    os.unlink(entry.path)
    return True


def _expire(directory: Path, step: int, dry_run: bool) -> Removal:
    name = checkpoint_name(step)
    size_bytes = tree_bytes(directory / name)
    try:
        if dry_run:
            reason = "is being read" if is_read(directory / name) else ""
            return Removal(name, size_bytes, "checkpoint", False, reason)
        remove(directory, step)
    except BeingRead:
        return Removal(name, size_bytes, "checkpoint", False, "is being read")
    except CheckpointError as error:
        return Removal(name, size_bytes, "checkpoint", False, str(error))
    return Removal(name, size_bytes, "checkpoint", True)
