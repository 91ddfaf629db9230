"""What each remote rank owns, beside the slots: a later saver on this endpoint reads it there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_MESSAGE_BYTES
from async_ckpt.core.private import read_capped, write_private
from async_ckpt.core.protocol import Layout, Process, decode_stored

from .spans import Span, pack, unpack

_REMOTE = "host:"
_PROCESS_CHARS = 4096


def as_remote(process: Process, host: str) -> Process:
    """As the lead knows a process of another host: it can be neither watched nor taken for one of its own."""
    return msgspec.structs.replace(process, pid_namespace=f"{_REMOTE}{host}/{process.pid_namespace}"[:_PROCESS_CHARS])


def host_of(process: Process) -> str | None:
    """The host of a remote process, None for one of this host."""
    if not process.pid_namespace.startswith(_REMOTE):
        return None
    return process.pid_namespace[len(_REMOTE) :].partition("/")[0]


def write_shares(run: Path, layout: Layout, shares: Mapping[int, Sequence[Span]]) -> None:
    """Raises CheckpointError if shared memory is full."""
    try:
        write_private(run / "layout.msgpack", msgspec.msgpack.encode(layout))
        for rank, spans in shares.items():
            write_private(run / f"share-{rank}", pack(spans))
    except OSError as error:
        raise CheckpointError(f"/dev/shm: cannot note in {run} what each rank owns: {error}") from error


def read_layout(run: Path) -> Layout:
    """Raises CheckpointError."""
    try:
        return decode_stored(read_capped(run / "layout.msgpack", MAX_MESSAGE_BYTES), Layout)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"the layout in {run} cannot be read: {error}") from error


def read_share(run: Path, rank: int, sizes_bytes: Sequence[int]) -> list[Span]:
    """Raises CheckpointError if there is none, or if it lies outside of files of `sizes_bytes`."""
    try:
        return unpack(read_capped(run / f"share-{rank}", MAX_MESSAGE_BYTES), sizes_bytes)
    except OSError as error:
        raise CheckpointError(f"what rank {rank} owns of {run} cannot be read: {error}") from error
