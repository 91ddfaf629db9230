"""The future of one upload to the second tier."""

from __future__ import annotations

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Location
from async_ckpt.core.protocol import Uploaded

from .latch import Latch


class Upload:
    def __init__(self) -> None:
        self._end: Uploaded | None = None
        self._ended = Latch()

    def end(self, uploaded: Uploaded) -> bool:
        """The first end counts; True if this is it."""
        if self._end is not None:
            return False
        self._end = uploaded
        self._ended.set()
        return True

    def wait(self, timeout_s: float, path: Location, limit_s: float) -> str:
        """The URL. `path` is where the checkpoint is committed all the same, `limit_s` what the caller asked for."""
        self._ended.wait(timeout_s)
        end = self._end
        if end is None:
            raise CheckpointError(f"{path} is committed, and not uploaded after {limit_s:g} s; the upload goes on")
        if end.outcome != "uploaded":
            raise CheckpointError(f"{path} is committed, but was not uploaded ({end.outcome}): {end.reason}")
        return end.url
