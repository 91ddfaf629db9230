"""A gate that opens once."""

from __future__ import annotations

import threading


class Latch:
    """`threading.Event` without `clear`: `set` happens before every `wait` that returns True. It is one lock, where an
    Event is three objects made in Python; a save makes four of them in the training thread."""

    __slots__ = ("_closed", "_gate")

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()
        self._closed = [self._gate]  # popped by the one `set` that opens it

    def is_set(self) -> bool:
        return not self._closed

    def set(self) -> None:
        try:
            gate = self._closed.pop()
        except IndexError:
            return
        gate.release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """True as soon as it is set; False if it is not after `timeout_s`."""
        if self._closed or self._gate.locked():
            limit_s = -1.0 if timeout_s is None else min(max(timeout_s, 0.0), threading.TIMEOUT_MAX)
            if not self._gate.acquire(timeout=limit_s):
                return False
            self._gate.release()  # for whoever else waits
        return True
