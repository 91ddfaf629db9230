"""A checkpoint directory as a reader or writer without torch sees it.

A directory ``checkpoint-<step>`` is a checkpoint if and only if it holds a readable ``async_ckpt.json`` for that very
step: the manifest is written last and the directory gets its name after that. Nothing here trusts a file it reads:
sizes are capped, types are checked, and paths cannot lead out of the checkpoint.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from typing import Annotated, Any, TypeAlias

import msgspec
import xxhash

from .errors import CheckpointError
from .limits import MAX_FILES, MAX_MANIFEST_BYTES, MAX_PATH_BYTES, MAX_STEP
from .location import Location, Url, location_of
from .object_errors import ObjectError
from .pieces import MAX_PIECES, PieceLine, check_pieces

logger = logging.getLogger(__name__)

MANIFEST_NAME = "async_ckpt.json"
FORMAT = 1
FORMAT_IN_PIECES = 2  # a file has no hash of its own: whoever knows only FORMAT has to say that it cannot read it

Metric: TypeAlias = bool | int | float | str | None
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Step = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)]
# The last key, so that it can cover every byte before its own value; an editor that changes one breaks it.
SEAL_KEY = b'"self_xxh3_128"'
_SEAL = b",\n  " + SEAL_KEY + b': "'
_SEAL_END = b'"\n}\n'
_DIGEST_BYTES = 32
_Digest = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{32})?$")]
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")


class FileEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """Size and content of one file of a checkpoint: its hash, or, where several hosts have written it, that of the
    lines of its `Manifest.pieces`. One of the two is there."""

    bytes: _Count
    xxh3_128: _Digest = ""
    pieces_xxh3_128: _Digest = ""


class Chunks(msgspec.Struct, frozen=True):
    """Hashes of every `bytes` of the files that are longer than that, so that damage can be placed. By path, in the
    file's order; the last chunk of a file may be shorter."""

    bytes: Annotated[int, msgspec.Meta(ge=1)]
    xxh3_64: dict[str, list[Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]]]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What ``async_ckpt.json`` says. `files` lists every file of the checkpoint but the manifest itself.

    `run` names the run that wrote it: a restarted saver knows its own commit by it. `pieces` are, by path, those of the
    files that several hosts have written (`core.pieces`); `format` is FORMAT_IN_PIECES then, and FORMAT otherwise.
    A metric that was NaN or infinite when it was saved is None here: JSON has no such numbers.
    """

    format: int
    step: _Step
    metrics: dict[str, Metric]
    extra: Any
    files: Annotated[dict[str, FileEntry], msgspec.Meta(max_length=MAX_FILES)]
    world: Annotated[int, msgspec.Meta(ge=1)] = 1
    versions: dict[str, str] = {}
    run: str = ""
    created_unix_s: float = 0.0
    chunks: Chunks | None = None
    pieces: dict[str, list[PieceLine]] | msgspec.UnsetType = msgspec.UNSET

    @property
    def in_pieces(self) -> dict[str, list[str]]:
        return self.pieces or {}

    @property
    def total_bytes(self) -> int:
        """Of all files, the manifest itself left out."""
        return sum(entry.bytes for entry in self.files.values())


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``async_ckpt.json``: what this returns, `decode_manifest` reads and `is_sealed` accepts.

    The last key, "self_xxh3_128", is the xxh3-128 of all bytes before its value's opening quote.

    Raises CheckpointError if `manifest` holds a value that could not be read back (a type JSON lacks, a negative step,
    a path that leads out, more than 16 MiB in all).
    """
    try:
        body = msgspec.json.format(msgspec.json.encode(manifest), indent=2).removesuffix(b"\n}") + _SEAL[:-1]
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the manifest of step {manifest.step} cannot be written as JSON: {error}") from error
    data = body + b'"' + xxhash.xxh3_128_hexdigest(body).encode() + _SEAL_END
    decode_manifest(data)
    return data


def is_sealed(data: bytes) -> bool:
    """Whether these are, to the bit, the bytes that `encode_manifest` made."""
    start = len(data) - len(_SEAL_END) - _DIGEST_BYTES
    if start < len(_SEAL) or not data.endswith(_SEAL_END) or data[start - len(_SEAL) : start] != _SEAL:
        return False
    return data[start : start + _DIGEST_BYTES] == xxhash.xxh3_128_hexdigest(data[: start - 1]).encode()


def decode_manifest(data: bytes) -> Manifest:
    """The inverse of `encode_manifest`; fields that a later version may add are ignored.

    Raises CheckpointError saying what is wrong.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"the manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        # As text: msgspec skips what it does not know, bytes that are no UTF-8 included.
        manifest = msgspec.json.decode(data.decode(), type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"the manifest is damaged: {error}") from error
    if manifest.format not in (FORMAT, FORMAT_IN_PIECES):
        raise CheckpointError(f"the manifest has format {manifest.format}, this version of async_ckpt reads {FORMAT} "
                              f"and {FORMAT_IN_PIECES}")  # fmt: skip
    for path in manifest.files:
        check_path(path)
    _check_hashes(manifest)
    return manifest


def _check_hashes(manifest: Manifest) -> None:
    """Raises CheckpointError unless every file has one hash, of itself or of its pieces."""
    pieces = manifest.in_pieces if manifest.format == FORMAT_IN_PIECES else {}
    if sum(map(len, pieces.values())) > MAX_PIECES:
        raise CheckpointError(f"the manifest has more than {MAX_PIECES} pieces (MAX_PIECES)")
    for path, entry in manifest.files.items():
        if bool(entry.pieces_xxh3_128) != (path in pieces) or bool(entry.xxh3_128) == (path in pieces):
            raise CheckpointError(f"the manifest is damaged: {path!r} has no hash, or two")
        if path in pieces:
            check_pieces(path, entry.bytes, entry.pieces_xxh3_128, pieces[path])


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of the checkpoint in `directory` (that is ``.../checkpoint-<step>``, or its URL), typed and capped.

    Raises CheckpointError with the path and the reason if it is missing, unreadable, or damaged.
    """
    path = location_of(directory) / MANIFEST_NAME
    try:
        return decode_manifest(manifest_bytes(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ObjectError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def manifest_bytes(path: Location) -> bytes:
    """What the file at `path` holds, a byte more than is allowed at most. Raises OSError, also for what is no file: a
    pipe of that name must hang nobody."""
    if isinstance(path, Url):
        return path.read_first(MAX_MANIFEST_BYTES + 1)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        return file.read(MAX_MANIFEST_BYTES + 1)


def check_path(path: str) -> str:
    """`path` itself if it names a file inside a checkpoint directory, other than the manifest.

    Raises CheckpointError for a path that is empty, absolute, too long, not in its shortest form, or has "..".
    """
    parts = path.split("/")
    if not all(parts) or "." in parts or ".." in parts or "\0" in path or path == MANIFEST_NAME:
        raise CheckpointError(f"{path!r} does not name a file inside a checkpoint; use a plain relative path")
    try:
        encoded = path.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the path {path!r} is not valid Unicode") from error
    if len(encoded) > MAX_PATH_BYTES:
        raise CheckpointError(f"the path {path[:60]!r}... has {len(encoded)} bytes, at most {MAX_PATH_BYTES}")
    return path


def checkpoint_name(step: int) -> str:
    """The name of the directory of `step`. Raises CheckpointError if no checkpoint can have that step."""
    if not 0 <= step <= MAX_STEP:
        raise CheckpointError(f"step {step} cannot name a checkpoint; steps are between 0 and {MAX_STEP}")
    return f"checkpoint-{step}"


def parse_step(name: str) -> int | None:
    """The step that `name` stands for, None if it is not exactly what `checkpoint_name` gives."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def committed(directory: str | os.PathLike[str]) -> list[tuple[int, Location]]:
    """Every committed checkpoint of a run as (step, path), in order of step; empty if `directory` does not exist.

    Only real directories count, no symbolic links. A path is `directory` as given, joined with the name.
    Raises CheckpointError if `directory` cannot be listed: that is not the same as having no checkpoint.
    """
    root = location_of(directory)
    return [(content.step, root / checkpoint_name(content.step)) for content in manifests(root)]


def manifests(directory: str | os.PathLike[str]) -> list[Manifest]:
    """Of every committed checkpoint, as `committed` has them."""
    root = location_of(directory)
    found = (_committed(root / checkpoint_name(step), step) for step in reversed(_named_steps(root)))
    return [content for content in found if content is not None]


def latest(directory: str | os.PathLike[str]) -> Location | None:
    """The newest committed checkpoint of a run, None if there is none or `directory` does not exist.

    `directory` is a path, or a URL (s3://, gs://, az://), and so is the answer. Right whatever the symbolic link
    ``latest`` says: the greatest step with a valid manifest wins.
    Raises CheckpointError if `directory` cannot be listed.
    """
    root = location_of(directory)
    for step in _named_steps(root):
        path = root / checkpoint_name(step)
        if _committed(path, step) is not None:
            return path
    return None


def _named_steps(root: Location) -> list[int]:
    """Steps of which there is a directory, greatest first."""
    if isinstance(root, Url):
        directories = root.folders()
    else:
        try:
            with os.scandir(root) as entries:
                directories = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        except OSError as error:
            # Answering "none" here would silently start a training run from scratch.
            raise CheckpointError(f"the checkpoints in {root} cannot be listed: {error.strerror or error}") from error
    return sorted((step for step in map(parse_step, directories) if step is not None), reverse=True)


def _committed(path: Location, step: int) -> Manifest | None:
    try:
        manifest = read_manifest(path)
    except ObjectError:
        raise  # nothing is known of it
    except CheckpointError as error:
        # Without a manifest it is another program's checkpoint, or retention took it meanwhile: nothing to report.
        if not isinstance(error.__cause__, FileNotFoundError):
            logger.warning("%s is not taken for a checkpoint: %s", path, error)
        return None
    if manifest.step != step:
        logger.warning("%s is not taken for a checkpoint: its manifest is of step %d", path, manifest.step)
        return None
    return manifest
