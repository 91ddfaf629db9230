"""Files of the caller's own in a checkpoint: committed with the weights, whole or not at all, and hashed like them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import MANIFEST_NAME, check_path

from .training_state import FOLDER

MAX_FILES_BYTES = 64 << 20  # they go through the journal of each save, not through the image


def own_files(files: Mapping[str, bytes] | None, taken: Collection[str]) -> dict[str, bytes]:
    """`files` by their paths inside the checkpoint, as bytes that nobody changes afterwards.

    `taken` are the paths of the checkpoint's other files. Raises CheckpointError naming the path that leads out of the
    checkpoint, is taken, would be read as weights, or is both a file and a folder; for what is not bytes; and for more
    than 64 MiB in all.
    """
    if files is None:
        return {}
    if not isinstance(files, Mapping):
        raise CheckpointError(f"files is a {type(files).__name__}: give a dict, as in {{'notes.txt': b'...'}}")
    found = {}
    for path, content in files.items():
        if not isinstance(path, str) or not isinstance(content, bytes | bytearray | memoryview):
            raise CheckpointError(f"files[{path!r}] is a {type(content).__name__}: give text and bytes")
        found[check_path(path)] = bytes(content)
    _check_places(found, taken)
    total_bytes = sum(map(len, found.values()))
    if total_bytes > MAX_FILES_BYTES:
        raise CheckpointError(
            f"files have {total_bytes} bytes in all, at most {MAX_FILES_BYTES}: larger ones do not belong here"
        )
    return found


def _check_places(files: Mapping[str, bytes], taken: Collection[str]) -> None:
    everything = {*files, *taken, MANIFEST_NAME}
    folders = {str(parent) for path in everything for parent in PurePosixPath(path).parents}
    for path in files:
        if path in taken or path.split("/")[0] == FOLDER:
            raise CheckpointError(f"files[{path!r}]: the checkpoint has a file of its own there; choose another name")
        if path.endswith(".safetensors"):  # whoever loads the checkpoint, `restore` too, takes them all for weights
            raise CheckpointError(f"files[{path!r}] would be read as weights; choose a name that ends otherwise")
        if path in folders or not everything.isdisjoint(map(str, PurePosixPath(path).parents)):
            raise CheckpointError(f"files[{path!r}] would be a file and a folder; choose another name")
