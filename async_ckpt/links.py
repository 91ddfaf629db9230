"""What the ranks of a job tell each other by torch's own key-value store: no collective. Nothing else touches it."""

from __future__ import annotations

import time

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from async_ckpt.core.errors import CheckpointError

_FIRST_LOOK_S, _LAST_LOOK_S = 0.01, 0.5  # thousands of ranks ask one store: less and less often


class Board:
    """The job's store, under a prefix: whoever can write to it can be a rank of the job, and run code there, so it may
    hold what only the job may know. Every method raises CheckpointError if the store cannot be reached."""

    def __init__(self, store: c10d.Store, prefix: str) -> None:
        self._store = c10d.PrefixStore(prefix, store)

    def put(self, key: str, value: bytes) -> None:
        """`value` is text, in UTF-8."""
        try:
            self._store.set(key, value.decode())
        except RuntimeError as error:
            raise _lost(error) from error

    def look(self, key: str) -> bytes | None:
        """What was put there, None if nothing was."""
        try:
            # `get` and `wait` would hold the store's lock while they wait, and torch's own threads need it.
            return bytes(self._store.get(key)) if self._store.check([key]) else None
        except RuntimeError as error:
            raise _lost(error) from error

    def wait_for(self, key: str, timeout_s: float) -> bytes | None:
        """What is put there within `timeout_s`, None if nothing is."""
        deadline_s, pause_s = time.monotonic() + timeout_s, _FIRST_LOOK_S
        while (found := self.look(key)) is None:
            if time.monotonic() > deadline_s:
                return None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_LOOK_S)
        return found

    def count(self, key: str, more: int = 0) -> int:
        """The number there, after adding `more` to it."""
        try:
            return int(self._store.add(key, more))
        except RuntimeError as error:
            raise _lost(error) from error

    def remove(self, key: str) -> None:
        try:
            self._store.delete_key(key)
        except RuntimeError as error:
            raise _lost(error) from error


def board_of_job(prefix: str) -> Board | None:
    """None where torch.distributed is not initialised, or has none, as under MPI."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    store = c10d._get_default_store()
    return Board(store, prefix) if store is not None else None


def _lost(error: RuntimeError) -> CheckpointError:
    return CheckpointError(
        f"the job's own store (torch.distributed's, at MASTER_ADDR:MASTER_PORT) does not answer: {error}; is the "
        f"process that holds it, torchrun's agent or rank 0, still there?"
    )
