"""Whether the saver answers."""

from __future__ import annotations

import logging
import time

from .embedded import EmbeddedSaver

log = logging.getLogger(__name__)

_SILENT_S = 10.0  # after which one full timeout is enough to wait for a saver
_UNANSWERED = 2  # and so many pings


class Pulse:
    """Kept by the client's thread, read by any."""

    def __init__(self, endpoint: str, embedded: EmbeddedSaver | None) -> None:
        self._endpoint = endpoint
        self._embedded = embedded
        self._heard_s = time.monotonic()
        self._unanswered = 0  # pings since then: after a pause of our own, time alone says nothing about the saver
        self._warned = False

    def pinged(self) -> None:
        self._unanswered += 1

    def heard(self) -> None:
        self._heard_s = time.monotonic()
        self._unanswered = 0
        self._warned = False

    def silent(self, for_s: float = _SILENT_S) -> bool:
        """Nothing has come from the saver for so long, though it is asked every second."""
        return self._unanswered > _UNANSWERED and time.monotonic() - self._heard_s > for_s

    @property
    def silence(self) -> str:
        """What to say and to do while the saver is silent."""
        which = f"at {self._endpoint}" if self._embedded is None else self._embedded.which
        return (f"the saver {which} does not answer: is it running? What is staged is safe in shared memory, and "
                f"is committed when a saver answers there")  # fmt: skip

    def warn_of_silence(self) -> None:
        """Once a silence."""
        if self.silent() and not self._warned:
            self._warned = True
            log.warning("%s", self.silence)
