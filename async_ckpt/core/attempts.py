"""Trying again, until when: networks are cut and stores say that they are busy, and nothing may hang for that."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from .object_errors import ObjectError, diagnose

log = logging.getLogger(__name__)
T = TypeVar("T")

_FIRST_S, _LONGEST_S = 0.1, 5.0


class Attempts:
    """All tries of one undertaking together end `timeout_s` from now. Only what may pass by itself is tried again:
    throttling, a cut connection, an error of the server; after waits that double, up to 5 s, and are drawn at random,
    so that many savers do not come back at once. `retries` counts them."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.retries = 0
        self._deadline_s = time.monotonic() + timeout_s
        self._stopped = threading.Event()

    @property
    def left_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())

    def run(self, what: str, work: Callable[[], T]) -> T:
        """What `work` returns. Raises ObjectError, or FileNotFoundError or FileExistsError as `work` did: these are
        answers."""
        wait_s = _FIRST_S
        tries = 0
        while True:
            tries += 1
            try:
                return work()
            except (FileExistsError, ObjectError):
                raise
            except Exception as error:
                problem = diagnose(what, error)
                if problem is None:
                    raise
                if not problem.passing:
                    raise problem from error
                pause_s = wait_s * (0.5 + random.random() / 2)
                if pause_s >= self.left_s:
                    raise problem.given_up(tries, self.timeout_s) from error
                log.warning("%s; trying again in %.1f s (attempt %d)", problem, pause_s, tries)
            self.retries += 1
            self._stopped.wait(pause_s)
            wait_s = min(_LONGEST_S, 2 * wait_s)
