"""Where checkpoints rest: a path on this host, or a URL in an object store.

A `Url` offers what readers of a checkpoint ask of a `Path` (`/`, `name`, `exists()`, `read_bytes()`, ...), so that they
need not know which of the two they hold. Naming one imports nothing; the first look into a store imports `obstore`.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from .errors import CheckpointError

if TYPE_CHECKING:
    from .objects import Objects

# What each scheme is called in messages.
SCHEMES = {"s3": "S3", "gs": "Google Cloud Storage", "az": "Azure Blob Storage"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}"
# What object stores, shells or URLs would read as something else.
_STRANGE = r"[\x00-\x1f\x7f?#%\\^`{}|<>\"~*\[\]]"


class Url(str):
    """`s3://bucket/prefix`, `gs://...` or `az://container/...`: text that knows its parts, without a slash at the end.

    Made by `location_of`, which checks it.
    """

    __slots__ = ()

    @property
    def scheme(self) -> str:
        return self.partition("://")[0]

    @property
    def bucket(self) -> str:
        return self.partition("://")[2].partition("/")[0]

    @property
    def key(self) -> str:
        """Within the bucket; empty for the bucket itself."""
        return self.partition("://")[2].partition("/")[2]

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        return Url(self.rpartition("/")[0]) if self.key else self

    def __truediv__(self, name: object) -> Url:
        return Url(f"{self}/{name}")

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    def is_relative_to(self, other: object) -> bool:
        return self == other or self.startswith(f"{other}/")

    def resolve(self) -> Url:
        return self

    def is_symlink(self) -> bool:
        return False

    # --- looking into the store ------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        return self._objects.stat(self.key) is not None or self.is_dir()

    def is_dir(self) -> bool:
        return self._objects.any_below(self.key)

    def read_bytes(self) -> bytes:
        return self._objects.read(self.key)

    def read_first(self, limit_bytes: int) -> bytes:
        return self._objects.read(self.key, limit_bytes)

    def folders(self) -> list[str]:
        """Names directly below under which there is something."""
        return self._objects.names(self.key)[0]

    def walk(self) -> list[str]:
        """The path from here of every object below."""
        return list(self._objects.walk(self.key))

    def iterdir(self) -> Iterator[Url]:
        folders, objects = self._objects.names(self.key)
        yield from (self / name for name in [*folders, *objects])

    def glob(self, pattern: str) -> Iterator[Url]:
        """Only names of objects directly below."""
        _, objects = self._objects.names(self.key)
        yield from (self / name for name in objects if fnmatch.fnmatchcase(name, pattern))

    @property
    def _objects(self) -> Objects:
        from .objects import Objects

        return Objects(self)


Location: TypeAlias = Union[Path, Url]  # noqa: UP007  (an alias is evaluated, and str subclasses have no | in 3.10)


def location_of(given: str | os.PathLike[str]) -> Location:
    """What the user named. Raises CheckpointError for a URL of a scheme that is not known, or that names no place."""
    if isinstance(given, Url):
        return given
    text = os.fspath(given) if not isinstance(given, str) else given
    match = _URL.match(text)
    if match is None:
        return Path(given)
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        raise CheckpointError(f"{text!r}: there is no storage for {scheme}://; give a path, s3://, gs:// or az://")
    bucket, *parts = text[match.end() :].rstrip("/").split("/")
    if not re.fullmatch(_BUCKET, bucket):
        raise CheckpointError(f"{text!r} names no bucket: give {scheme}://BUCKET/PREFIX")
    if not all(parts) or "." in parts or ".." in parts or re.search(_STRANGE, "".join(parts)):
        raise CheckpointError(
            f"{text!r}: the prefix has an empty part, '.', '..' or one of ?#%\\^`{{}}|<>\"~*[] in it: choose another"
        )
    return Url("/".join([f"{scheme}://{bucket}", *parts]))


def is_url(given: object) -> bool:
    """Whether `given` is the text of a URL, of whatever scheme."""
    return isinstance(given, str) and _URL.match(given) is not None


def local_path(given: str | os.PathLike[str], what: str) -> Path:
    """For what needs a directory of this host. Raises CheckpointError naming `what` if it is a URL."""
    found = location_of(given)
    if isinstance(found, Url):
        raise CheckpointError(f"{what} needs a directory of this host, {found} is in an object store: copy it first")
    return found
