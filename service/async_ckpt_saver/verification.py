"""Is a checkpoint, to the bit, what was committed, and does what it says make sense? Needs neither torch nor numpy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.holding import reading
from async_ckpt.core.layout import FileLayout
from async_ckpt.core.location import Location, Url
from async_ckpt.core.manifest import (
    MANIFEST_NAME,
    SEAL_KEY,
    Manifest,
    decode_manifest,
    is_sealed,
    manifest_bytes,
    parse_step,
)
from async_ckpt.core.pieces import hashes_of, stops_of

from .contents import unreasonable
from .datafile import CHUNK_BYTES, Digests
from .rehash import NotAFile, Progress, opened
from .tensorfile import SUFFIX, read_layout, tensors_within

_SHOWN = 3  # names of damaged tensors in a line before "and N more"


class Damage(msgspec.Struct, frozen=True):
    """What is wrong in `file`, a path within the checkpoint: bytes [start, stop) of it, if they can be told. `tensors`
    are the names of those that lie in these bytes."""

    file: str
    what: str
    start: int | None = None
    stop: int | None = None
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = self.file if self.start is None else f"{self.file}: bytes {self.start}-{self.stop}"
        more = f" and {len(self.tensors) - _SHOWN} more" if len(self.tensors) > _SHOWN else ""
        within = f" (in {', '.join(self.tensors[:_SHOWN])}{more})" if self.tensors else ""
        return f"{where}: {self.what}{within}"


class Report(msgspec.Struct, frozen=True):
    """`bytes` and `files` count what was read. `unlisted` are files that the manifest does not know: no damage, but
    nobody vouches for them."""

    checkpoint: str
    step: int | None
    files: int
    bytes: int
    damage: list[Damage]
    unlisted: list[str]


def verify(checkpoint: Location, progress: Progress = lambda done_bytes: None) -> Report:
    """Compare every file of `checkpoint` with its manifest, and the manifest with its own hash.

    The bytes come from storage, not from a page cache that may be better than the disk. `progress` is told how many
    bytes were read since the last time. Raises CheckpointError if there is no directory; anything wrong in it is
    damage, never an error.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a directory: give a checkpoint, or a directory of checkpoints")
    with reading(checkpoint):
        return _verify(checkpoint, progress)


def _verify(checkpoint: Location, progress: Progress) -> Report:
    present = set(_files(checkpoint))
    manifest, damage = _manifest(checkpoint)
    if manifest is None:
        return Report(str(checkpoint), None, 1, 0, damage, sorted(present - {MANIFEST_NAME}))
    total_bytes = 0
    whole = set()
    for name in sorted(manifest.files):
        found = list(_damage_of(checkpoint, name, manifest, progress))
        total_bytes += manifest.files[name].bytes
        damage += found
        if not found:
            whole.add(name)
    damage += [Damage(name, what) for name, what in unreasonable(checkpoint, whole, manifest.world)]
    unlisted = sorted(present - {MANIFEST_NAME} - set(manifest.files))
    return Report(str(checkpoint), manifest.step, len(manifest.files) + 1, total_bytes, damage, unlisted)


def planned_bytes(checkpoint: Location) -> int:
    """How many bytes `verify` will read, as far as the manifest can be believed."""
    manifest, _ = _manifest(checkpoint)
    return 0 if manifest is None else manifest.total_bytes


def _files(checkpoint: Location) -> Iterator[str]:
    if isinstance(checkpoint, Url):
        yield from checkpoint.walk()
        return
    for folder, _, names in os.walk(checkpoint):
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), checkpoint)


def _manifest(checkpoint: Location) -> tuple[Manifest | None, list[Damage]]:
    try:
        data = manifest_bytes(checkpoint / MANIFEST_NAME)
    except OSError as error:
        return None, [Damage(MANIFEST_NAME, f"cannot be read: {error.strerror or error}")]
    problem = "its own hash does not fit" if SEAL_KEY in data else "it has no hash of its own"
    broken = Damage(MANIFEST_NAME, f"is not what was committed: {problem}", 0, len(data))
    try:
        manifest = decode_manifest(data)
    except CheckpointError as error:
        return None, [Damage(MANIFEST_NAME, str(error), 0, len(data))]
    damage = [] if is_sealed(data) else [broken]
    named = parse_step(checkpoint.resolve().name)
    if named is not None and named != manifest.step:
        damage.append(Damage(MANIFEST_NAME, f"is of step {manifest.step}, in a directory of step {named}"))
    return manifest, damage


def _damage_of(checkpoint: Location, name: str, manifest: Manifest, progress: Progress) -> Iterator[Damage]:
    path, entry = checkpoint / name, manifest.files[name]
    expected, stops = _chunks_of(manifest, name)
    digests = Digests(CHUNK_BYTES, stops)
    try:
        with opened(path) as file:
            if file.bytes != entry.bytes:
                start, stop = sorted((file.bytes, entry.bytes))
                what = "cut off" if file.bytes < entry.bytes else "added"
                yield Damage(name, f"has {file.bytes} bytes, {entry.bytes} were committed: {what}", start, stop)
                return
            file.digest(digests, progress)
    except NotAFile as error:
        yield Damage(name, str(error))
        return
    except OSError as error:
        yield Damage(name, f"cannot be read: {error.strerror or error}")
        return
    layout: FileLayout | None = None
    if name.endswith(SUFFIX):
        try:
            layout = read_layout(path)
        except CheckpointError as error:
            yield Damage(name, str(error))
    intact = digests.whole == entry.xxh3_128 if entry.xxh3_128 else list(digests.all) == expected
    if not intact:
        for start, stop in list(_differing(digests.all, expected, stops)) or [(0, entry.bytes)]:
            tensors = tensors_within(layout, start, stop) if layout is not None else []
            names = tuple(extent.spec.name for extent in tensors)
            yield Damage(name, "not the bytes that were committed", start, stop, names)


def _chunks_of(manifest: Manifest, name: str) -> tuple[list[str], list[int]]:
    """The hashes of the chunks or pieces of `name`, and where these end. A manifest may be forged: its chunks count
    only if it has a hash for each, for each costs memory and it cannot have many; else there are none."""
    length = manifest.files[name].bytes
    if name in manifest.in_pieces:
        lines = manifest.in_pieces[name]
        return hashes_of(lines), stops_of(lines)
    if manifest.chunks is not None:
        hashes, chunk_bytes = manifest.chunks.xxh3_64.get(name, []), manifest.chunks.bytes
        if len(hashes) == -(-length // chunk_bytes):
            return hashes, [min(stop, length) for stop in range(chunk_bytes, length + chunk_bytes, chunk_bytes)]
    return [], [length] if length else []


def _differing(found: Sequence[str], expected: Sequence[str], stops: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring damaged chunks as one range; nothing if the file has no hashes of chunks to compare with."""
    if len(found) != len(expected):
        return
    start: int | None = None
    for one, other, begin in zip([*found, ""], [*expected, ""], [0, *stops], strict=True):
        if one != other and start is None:
            start = begin
        elif one == other and start is not None:
            yield start, begin
            start = None
