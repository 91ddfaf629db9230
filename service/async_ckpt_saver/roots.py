"""What bounds every write of a saver: directories of this host, and prefixes of object stores."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Location, Url, location_of

from .settings import texts_of

if TYPE_CHECKING:
    from .storage import Storage

SEPARATOR = ","


class Roots:
    """Nothing is ever written outside them. Symbolic links in the directories' own names are followed once, here."""

    def __init__(self, given: Iterable[Location]) -> None:
        self.all = [each.resolve() for each in given]
        if not self.all:
            raise CheckpointError("a saver needs at least one root: give --root")

    @classmethod
    def parse(cls, text: str) -> Roots:
        """Several are separated by commas; one within a name has a backslash before it. Raises CheckpointError for a
        URL that names no place."""
        return cls(location_of(each) for each in texts_of(text))

    def __str__(self) -> str:
        return SEPARATOR.join(map(str, self.all))

    @property
    def directories(self) -> list[Path]:
        return [each for each in self.all if isinstance(each, Path)]

    def covers(self, directory: str) -> bool:
        """By the names alone: symbolic links are followed when the directory is prepared."""
        return self._root_of(directory) is not None

    def storage(self, directory: str) -> Storage:
        """Where the checkpoints of `directory` rest; nothing is done there yet. Raises CheckpointError if it is outside
        every root."""
        root = self._root_of(directory)
        if root is None:
            raise CheckpointError(f"{directory} is outside the root {self}")
        if isinstance(root, Path):
            from .local_storage import LocalStorage  # not before the saver answers

            return LocalStorage(directory, root)
        from .object_storage import ObjectStorage  # takes time to import, and most savers have none

        url = location_of(directory)
        assert isinstance(url, Url)
        return ObjectStorage(url)

    def _root_of(self, directory: str) -> Location | None:
        try:
            given = location_of(directory)
        except CheckpointError:
            return None
        if isinstance(given, Path):
            if not given.is_absolute():
                return None
            given = Path(os.path.normpath(given))
        return next((root for root in self.all if type(root) is type(given) and given.is_relative_to(root)), None)
