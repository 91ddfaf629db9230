"""The manifest of a checkpoint whose files have been written."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import FORMAT, FORMAT_IN_PIECES, Chunks, Manifest, decode_manifest, encode_manifest
from async_ckpt.core.pieces import stops_of

from .datafile import CHUNK_BYTES, Written

if TYPE_CHECKING:
    from .writer import CommitJob


def manifest_of(job: CommitJob, written: dict[str, Written]) -> bytes:
    """The bytes of the manifest, which name every file but itself. Raises CheckpointError."""
    if job.original:
        return _same_as_original(job, written)
    chunks = {path: list(file.chunks) for path, file in written.items() if file.chunks}
    pieces = {path: list(file.pieces) for path, file in written.items() if file.pieces}
    manifest = Manifest(
        format=FORMAT_IN_PIECES if pieces else FORMAT,
        step=job.step,
        metrics=job.metrics,
        extra=job.extra,
        files={path: file.entry for path, file in written.items()},
        world=job.world,
        versions=job.versions,
        run=job.run,
        created_unix_s=time.time(),
        chunks=Chunks(CHUNK_BYTES, chunks) if chunks else None,
        pieces=pieces or msgspec.UNSET,
    )
    return encode_manifest(manifest)


def stops_in(job: CommitJob) -> dict[str, list[int]]:
    """Of an original, where the pieces end of the files that have no hash of their own, by path."""
    pieces = decode_manifest(job.original).in_pieces if job.original else {}
    return {path: stops_of(lines) for path, lines in pieces.items()}


def _same_as_original(job: CommitJob, written: dict[str, Written]) -> bytes:
    there = decode_manifest(job.original).files
    for path in sorted(there.keys() | written.keys()):
        if path not in there or path not in written or written[path].entry != there[path]:
            raise CheckpointError(f"{os.path.join(job.image, path)} is not what its manifest says: it is damaged, and "
                                  f"is not copied; `async-ckpt-saver verify` says where")  # fmt: skip
    return job.original
