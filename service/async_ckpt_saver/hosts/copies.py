"""Whole checkpoints in shared memory, for a job that comes back without one of its hosts.

    /dev/shm/async-ckpt-<uid>/copy-<key>-<random>/
        checkpoint/     its files, byte for byte as committed, the manifest among them
        copy.msgpack    `CopyRecord`, written last: without it there is no copy

What a copy consists of is what the manifest lists; both ends cut it into the same pieces, named by their numbers, so
nobody can be told to write anywhere else. A copy is whole when every file hashes as the manifest says.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import xxhash

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.images import image_bytes
from async_ckpt.core.limits import MAX_MANIFEST_BYTES
from async_ckpt.core.manifest import MANIFEST_NAME, Manifest, decode_manifest, is_sealed
from async_ckpt.core.private import private_directory, read_capped, write_private
from async_ckpt.core.protocol import Layout, decode_stored
from async_ckpt.core.slots import MORE_SPACE, SHM, copy_paths, new_copy_path

from .link_words import MAX_COPY_PIECE_BYTES
from .spans import Pieces, Span

_RECORD = "copy.msgpack"
_RECORD_BYTES = 1 << 16
_FOLDER = "checkpoint"
_HASHED_BYTES = 8 << 20


class CopyRecord(msgspec.Struct, frozen=True):
    """`digest` is that of the manifest: it tells a checkpoint from any other, also of the same step."""

    directory: str
    step: int
    digest: bytes


def digest_of(manifest: bytes) -> bytes:
    return xxhash.xxh3_128_digest(manifest)


def pieces_of(manifest: Manifest) -> Pieces:
    sizes_bytes = [entry.bytes for entry in manifest.files.values()]
    spans = [Span(n, 0, size) for n, size in enumerate(sizes_bytes) if size]
    return Pieces(spans, MAX_COPY_PIECE_BYTES, MAX_COPY_PIECE_BYTES)


def require_room(layout: Layout, had_bytes: int) -> None:
    """Raises CheckpointError unless there is room for two copies of a checkpoint of `layout`, of which `had_bytes` are
    taken already: a new one is whole before the older one goes."""
    needed_bytes = 2 * image_bytes(layout) - had_bytes
    info = os.statvfs(SHM)
    available_bytes = info.f_bavail * info.f_frsize
    if needed_bytes > available_bytes:
        raise CheckpointError(
            f"/dev/shm of {socket.gethostname()} has {available_bytes} bytes available besides its slots, but this "
            f"host is to keep a copy of each checkpoint (replicas=1), which needs {needed_bytes}: the last one and the "
            f"one that takes its place. {MORE_SPACE}; or attach with replicas=0"
        )


class Copy:
    """A whole one."""

    def __init__(self, path: Path, record: CopyRecord) -> None:
        self.path, self.record = path, record
        self.checkpoint = path / _FOLDER

    def source(self) -> Source:
        """Raises CheckpointError."""
        return folder_source(self.checkpoint)

    def allocated_bytes(self) -> int:
        paths = [path for path in self.path.rglob("*") if path.is_file()]
        return sum(path.stat().st_blocks * 512 for path in paths)

    def damage(self) -> str:
        """What is wrong with it, "" if every byte is as it was committed. Blocks for as long as hashing takes."""
        try:
            data = _manifest_of(self.checkpoint)
            if digest_of(data) != self.record.digest:
                return f"{self.checkpoint / MANIFEST_NAME} is another one"
            for path, entry in decode_manifest(data).files.items():
                if _hash(self.checkpoint / path) != entry.xxh3_128:
                    return f"{self.checkpoint / path} does not hash as its manifest says"
        except (OSError, CheckpointError) as error:
            return str(error)
        return ""

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            (self.path / _RECORD).unlink(missing_ok=True)  # first: what is left of a killed removal is no copy
        shutil.rmtree(self.path, ignore_errors=True)


def find_copies(endpoint: str) -> list[Copy]:
    """What earlier savers on `endpoint` kept. A copy that they did not finish is removed."""
    found = []
    for path in copy_paths(endpoint):
        try:
            record = decode_stored(read_capped(path / _RECORD, _RECORD_BYTES), CopyRecord)
        except (OSError, msgspec.DecodeError):
            shutil.rmtree(path, ignore_errors=True)
            continue
        found.append(Copy(path, record))
    return found


class Source:
    """A checkpoint in RAM, to be read piece by piece: files in `folder`, others as `documents` have them. It may be a
    slot, which ranks fill anew: it is there as long as `whole` says so, before and after it was read."""

    def __init__(
        self, manifest: bytes, folder: Path, documents: Mapping[str, bytes], whole: Callable[[], bool]
    ) -> None:
        """Raises CheckpointError if the manifest cannot be read."""
        self.manifest, self.digest = manifest, digest_of(manifest)
        self._paths = list(decode_manifest(manifest).files)
        self._pieces = pieces_of(decode_manifest(manifest))
        self.folder, self._documents, self._whole = folder, documents, whole

    @property
    def there(self) -> bool:
        try:
            return self._whole()
        except ValueError:  # the run was removed from shared memory
            return False

    def read(self, number: int) -> bytes | None:
        """None if it is not there any more. Raises IndexError if there is no such piece."""
        parts = self._pieces.cut(number)
        if not self.there:
            return None
        try:
            data = b"".join(self._part(part) for part in parts)
        except OSError:
            return None
        return data if self.there and len(data) == self._pieces.size_bytes(number) else None

    def _part(self, span: Span) -> bytes:
        path = self._paths[span.file]
        if path in self._documents:
            return self._documents[path][span.start : span.stop]
        fd = os.open(self.folder / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return os.pread(fd, span.stop - span.start, span.start)
        finally:
            os.close(fd)


def folder_source(checkpoint: Path) -> Source:
    """Of a folder in RAM with all files of a checkpoint. Raises CheckpointError."""
    try:
        data = _manifest_of(checkpoint)
    except OSError as error:
        raise CheckpointError(f"{checkpoint} has no manifest that can be read: {error}") from error
    return Source(data, checkpoint, {}, lambda: (checkpoint / MANIFEST_NAME).exists())


class Copying:
    """A copy in the making, until `finish` or `abandon`: `next_number` is to be asked for, `take` gets what comes.
    Pieces come in the order in which they were asked for."""

    def __init__(self, path: Path, record: CopyRecord, manifest: bytes) -> None:
        self.record = record
        self._path, self._manifest = path, manifest
        self._content = decode_manifest(manifest)
        self._names = list(self._content.files)
        self._pieces = pieces_of(self._content)
        self._asked = self._taken = 0
        self._hashes = [xxhash.xxh3_128() for _ in self._names]
        self._files: dict[int, int] = {}

    @classmethod
    def begin(cls, endpoint: str, directory: str, manifest: bytes) -> Copying:
        """Every byte of it is reserved. Raises CheckpointError, with the bytes needed if there is no room; then nothing
        of it is left."""
        if not is_sealed(manifest):
            raise CheckpointError(f"what was offered as a manifest of a checkpoint in {directory} is damaged")
        content = decode_manifest(manifest)
        path = new_copy_path(endpoint)
        try:
            private_directory(path)
            copying = cls(path, CopyRecord(directory, content.step, digest_of(manifest)), manifest)
            copying._reserve()
        except (OSError, CheckpointError) as error:
            shutil.rmtree(path, ignore_errors=True)
            info = os.statvfs(SHM)
            raise CheckpointError(
                f"no copy of step {content.step} of {directory} can be kept in /dev/shm ({error}): it needs "
                f"{content.total_bytes} bytes, and {info.f_bavail * info.f_frsize} are available. {MORE_SPACE}"
            ) from error
        return copying

    @property
    def complete(self) -> bool:
        return self._taken == self._pieces.count

    def next_number(self, window: int) -> int | None:
        """The piece to ask for now, if fewer than `window` are on their way."""
        if self._asked >= self._pieces.count or self._asked - self._taken >= window:
            return None
        self._asked += 1
        return self._asked - 1

    def ask_again(self) -> None:
        """What was on its way is lost."""
        self._asked = self._taken

    def take(self, number: int, data: bytes) -> bool:
        """Whether it is what comes next; else nothing has changed. Raises OSError."""
        if number != self._taken or number >= self._asked or len(data) != self._pieces.size_bytes(number):
            return False
        position = 0
        for span in self._pieces.cut(number):
            length = span.stop - span.start
            part = memoryview(data)[position : position + length]
            self._hashes[span.file].update(part)
            fd = self._file(span.file)
            done = 0
            while done < length:
                done += os.pwrite(fd, part[done:], span.start + done)
            position += length
        self._taken += 1
        return True

    def finish(self) -> Copy:
        """Raises CheckpointError if a file is not what the manifest says, OSError."""
        for name, hashed in zip(self._names, self._hashes, strict=True):
            if hashed.hexdigest() != self._content.files[name].xxh3_128:
                raise CheckpointError(f"{name} of step {self.record.step} does not hash as its manifest says")
        write_private(self._path / _FOLDER / MANIFEST_NAME, self._manifest)
        write_private(self._path / f"{_RECORD}.tmp", msgspec.msgpack.encode(self.record))
        (self._path / f"{_RECORD}.tmp").replace(self._path / _RECORD)
        self._close()
        return Copy(self._path, self.record)

    def abandon(self) -> None:
        """Nothing of it is left."""
        self._close()
        shutil.rmtree(self._path, ignore_errors=True)

    def _reserve(self) -> None:
        folder = self._path / _FOLDER
        folder.mkdir(mode=0o700)
        for name, entry in self._content.files.items():
            path = folder / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                if entry.bytes:
                    os.posix_fallocate(fd, 0, entry.bytes)
            finally:
                os.close(fd)

    def _file(self, number: int) -> int:
        """One at a time: pieces come in order."""
        if number not in self._files:
            self._close()
            path = self._path / _FOLDER / self._names[number]
            self._files[number] = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return self._files[number]

    def _close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def _manifest_of(checkpoint: Path) -> bytes:
    return read_capped(checkpoint / MANIFEST_NAME, MAX_MANIFEST_BYTES)


def _hash(path: Path) -> str:
    hashed = xxhash.xxh3_128()
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as file:
        while data := file.read(_HASHED_BYTES):
            hashed.update(data)
    return hashed.hexdigest()
