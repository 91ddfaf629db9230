"""A file of trace events that many processes of a host append to, and that is whole JSON whenever none of them writes.

    [
    {"name": "trace begins", ...}
    ,{"name": "save", ...}
    ]

One event a line, and the last bytes are always `]` and a newline: an append replaces them. A process that is killed in
the middle of one leaves a torn line, which whoever appends next cuts off.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from async_ckpt.core.clock import Clock
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.private import read_capped

MAX_TRACE_BYTES = 256 << 20  # of a file: what the viewers still open
_END = b"]\n"
_TORN_BYTES = 1 << 20  # of the end of a file that are searched for the last whole line
_HEADER_BYTES = 64 << 10

Event = dict[str, Any]


class Header(msgspec.Struct, frozen=True):
    """What the first event says in its `args`: whose file this is, and by which clock its times are."""

    job: str
    clock: Clock


class TraceFull(CheckpointError):
    """The file has the greatest size that it may have."""


class TraceFile:
    """Open for appending. Its methods may block as long as the filesystem does."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if it is not there, or cannot be written to."""
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    @classmethod
    def create(cls, path: Path, first: Event) -> TraceFile:
        """A new file, whole at once, whose first event is `first`. One that was there is kept as `<name>.1`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(b"[\n" + _line(first) + _END)
            if path.is_file():
                path.replace(path.with_name(path.name + ".1"))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return cls(path)

    def append(self, events: Sequence[Event]) -> None:
        """All of `events` are in the file afterwards, or none. Raises TraceFull, and OSError for the rest."""
        data = b"".join(b"," + _line(event) for event in events) + _END
        with self._locked():
            start = self._end()
            if start + len(data) > MAX_TRACE_BYTES:
                raise TraceFull(f"{self.path} has {start} bytes, at most {MAX_TRACE_BYTES} are written: give another "
                                f"name to trace further")  # fmt: skip
            try:
                _write_all(self._fd, data, start)
            except BaseException:
                os.ftruncate(self._fd, start)
                os.pwrite(self._fd, _END, start)  # these two bytes had a place before
                raise

    def close(self) -> None:
        os.close(self._fd)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _end(self) -> int:
        """Where the next event goes."""
        size = os.fstat(self._fd).st_size
        if os.pread(self._fd, len(_END), size - len(_END)) == _END:
            return size - len(_END)
        start = max(0, size - _TORN_BYTES)
        tail = os.pread(self._fd, size - start, start)
        end = tail.rfind(b"}\n")
        if end < 0:
            raise OSError(f"{self.path} is no trace of async_ckpt any more")
        return start + end + 2


def read_header(path: Path) -> Header:
    """Raises OSError if there is no file, CheckpointError if it is none of ours."""
    with path.open("rb") as file:
        lines = file.read(_HEADER_BYTES).split(b"\n", 2)
    try:
        return msgspec.convert(msgspec.json.decode(lines[1])["args"], Header)
    except (IndexError, KeyError, TypeError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path} is no trace of async_ckpt: {error}") from error


def read_events(path: Path) -> list[Event]:
    """All events, also of a file whose last line is torn. Raises OSError, and CheckpointError if it is none of ours."""
    data = read_capped(path, MAX_TRACE_BYTES)
    whole = data[: data.rfind(b"}\n") + 2] + _END if not data.endswith(b"\n" + _END) else data
    try:
        return msgspec.json.decode(whole, type=list[Event])
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is no trace of async_ckpt: {error}") from error


def _line(event: Event) -> bytes:
    return msgspec.json.encode(event) + b"\n"


def _write_all(fd: int, data: bytes, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], start + done)
