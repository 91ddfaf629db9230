"""Where checkpoints go: one place, or a fast one of this host and a second one behind it, as the user names them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Location, Url, location_of

DEFAULT = "checkpoints"


@dataclass(frozen=True)
class Places:
    """`given` is the first as the user named it, `first` the same place, absolute; `second` None if there is none."""

    given: Location
    first: Location
    second: Location | None


def places_of(directory: str | os.PathLike[str], tiers: Sequence[str | os.PathLike[str]] | None) -> Places:
    """Of attach's arguments. Raises CheckpointError saying what to give instead."""
    if tiers is None:
        given = _location(directory)
        return Places(given, given.resolve(), None)
    if isinstance(tiers, str | os.PathLike) or len(tiers) != 2:
        raise CheckpointError(f"tiers={tiers!r}: give two places, a directory of this host and one that outlives it, "
                              f"as in tiers=['/local/ckpt', 's3://bucket/run']")  # fmt: skip
    given, second = map(_location, tiers)
    first, second = given.resolve(), second.resolve()
    if isinstance(first, Url):
        raise CheckpointError(f"tiers={list(map(str, tiers))}: the first one is a directory of this host, from which "
                              f"the second gets its copies; without one, give directory={str(first)!r}")  # fmt: skip
    if os.fspath(directory) != DEFAULT and _location(directory).resolve() != first:
        raise CheckpointError(f"directory={os.fspath(directory)!r} and tiers[0]={os.fspath(tiers[0])!r} are two "
                              f"places: with tiers, leave directory out")  # fmt: skip
    if isinstance(second, Path) and (second.is_relative_to(first) or first.is_relative_to(second)):
        raise CheckpointError(f"tiers={list(map(str, tiers))}: one lies within the other: choose two places")
    return Places(given, first, second)


def _location(given: str | os.PathLike[str]) -> Location:
    found = location_of(given)
    return found if isinstance(found, Url) else found.expanduser()
