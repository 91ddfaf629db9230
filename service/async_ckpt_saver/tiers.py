"""Two places for the checkpoints of one directory: what both are asked when a run attaches.

The second one may be out of reach: a store's outage must not keep a job from going on with what lies on its own disk.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.object_errors import ObjectError

from .roots import Roots
from .storage import Storage

T = TypeVar("T")

log = logging.getLogger(__name__)

_PATIENCE_S = 30.0  # for the second tier, while ranks wait
_MISTAKES = frozenset({errno.EACCES, errno.EINVAL, errno.ENOENT})  # no wait helps


class Tiers:
    """`second` is None where a directory has no other. Every method blocks."""

    def __init__(self, roots: Roots, directory: str, upload_to: str, timeout_s: float) -> None:
        self.first = roots.storage(directory)
        self.second = roots.storage(upload_to) if upload_to else None
        self._patience_s = min(_PATIENCE_S, timeout_s / 4)

    def prepare(self) -> Callable[[], None]:
        """As `Storage.prepare`, of both. Raises CheckpointError if the second one takes nothing and that is no outage,
        or if the first one has no checkpoint to go on from."""
        undo = self.first.prepare()
        try:
            undo_second = self._reach(self.second, self.second.prepare) if self.second is not None else None
        except BaseException:
            undo()
            raise

        def undo_both() -> None:
            undo()
            if undo_second is not None:
                undo_second()

        return undo_both

    def newest(self) -> tuple[int, str] | None:
        """Step and path of the newest checkpoint of both; of equal ones that of the first."""
        here = self.first.newest()
        if self.second is None:
            return here
        there = self._reach(self.second, self.second.newest)
        return there if there is not None and (here is None or there[0] > here[0]) else here

    def _reach(self, second: Storage, ask: Callable[[], T]) -> T | None:
        """What it answers; None if it is out of reach."""
        try:
            return _in_time(ask, self._patience_s, second.directory)
        except _OutOfReach as error:
            here = self.first.newest()
            if here is None:  # beginning anew could not be told from going on
                raise
            log.error("the second tier cannot be reached, the run goes on from %s, and there may be a newer one in %s: "
                      "%s", here[1], second.directory, error)  # fmt: skip
            return None


class _OutOfReach(CheckpointError):
    pass


def _in_time(ask: Callable[[], T], patience_s: float, place: str) -> T:
    """A filesystem or a store that hangs keeps its own thread. Raises _OutOfReach, or what `ask` raises where no wait
    would help."""
    answers: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(ask())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="second-tier", daemon=True)
    thread.start()
    thread.join(patience_s)
    if answers:
        return answers[0]
    if errors and isinstance(errors[0], ObjectError) and errors[0].errno not in _MISTAKES:
        raise _OutOfReach(str(errors[0])) from errors[0]
    if errors:
        raise errors[0]
    raise _OutOfReach(f"{place} does not answer within {patience_s:g} s: see whether it can be reached from this host")
