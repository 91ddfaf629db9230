"""A question to a living saver, over its socket."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.protocol import Status, StatusWanted, decode_from_saver, encode
from async_ckpt.core.transport import Ipc, transport_of

from .status import SaverStatus, decode_status

if TYPE_CHECKING:
    from async_ckpt.core.keys import ClientKeys


class Asker:
    """One socket to the saver at `endpoint`, for one question or many. Over tcp it has the keys that a rank has."""

    def __init__(self, endpoint: str) -> None:
        """Raises CheckpointError if that is no address of a saver, or if keys are missing."""
        self.endpoint = endpoint
        self._transport = transport_of(endpoint)
        self._keys: ClientKeys | None = None
        if self._transport.encrypted:
            from async_ckpt.core.keys import client_keys

            self._keys = client_keys(os.environ)
        self._context = zmq.Context(1)

    def status(self, timeout_s: float) -> SaverStatus:
        """Raises CheckpointError if no saver answers in time, or it answers with something else."""
        if isinstance(self._transport, Ipc) and not self._transport.path.exists():
            raise CheckpointError(f"no saver listens at {self.endpoint}: there is no such socket")
        with self._context.socket(zmq.DEALER) as socket:
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.RECONNECT_IVL, 20)
            self._transport.connect(socket, self._keys)
            socket.send(encode(StatusWanted()))
            if not socket.poll(int(timeout_s * 1000)):
                raise CheckpointError(f"no saver answers at {self.endpoint} within {timeout_s:g} s")
            try:
                answer = decode_from_saver(socket.recv())
                if not isinstance(answer, Status):
                    raise CheckpointError(f"{self.endpoint} answered with {type(answer).__name__}, not with its status")
                return decode_status(answer.report)
            except msgspec.DecodeError as error:
                raise CheckpointError(f"{self.endpoint} sent a status that cannot be read, is it of another version? "
                                      f"({error})") from error  # fmt: skip

    def close(self) -> None:
        self._context.term()


@contextlib.contextmanager
def asking(endpoint: str) -> Iterator[Asker]:
    asker = Asker(endpoint)
    try:
        yield asker
    finally:
        asker.close()


def holder(lock_path: Path) -> int | None:
    """The pid of the living saver that holds the lock of its endpoint, None if there is none. Raises OSError."""
    try:
        lock = os.open(lock_path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(lock, 32, 0) or b"0")
    finally:
        os.close(lock)
    return None
