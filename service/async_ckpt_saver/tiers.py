"""Two places for the checkpoints of one directory: what both are asked when a run attaches.

The second one may be out of reach: a store's outage must not keep a job from going on with what lies on its own disk.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from async_ckpt.core.object_errors import ObjectError

from .roots import Roots
from .storage import Storage

log = logging.getLogger(__name__)

_MISTAKES = frozenset({errno.EACCES, errno.EINVAL, errno.ENOENT})  # no wait helps


class Tiers:
    """`second` is None where a directory has no other. Every method blocks."""

    def __init__(self, roots: Roots, directory: str, upload_to: str) -> None:
        self.first = roots.storage(directory)
        self.second = roots.storage(upload_to) if upload_to else None

    def prepare(self) -> Callable[[], None]:
        """As `Storage.prepare`, of both. Raises CheckpointError if the second one takes nothing and that is no outage,
        or if the first one has no checkpoint to go on from."""
        undo = self.first.prepare()
        try:
            if self.second is not None:
                self._reach(self.second, self.second.prepare)
        except BaseException:
            undo()
            raise
        return undo

    def newest(self) -> tuple[int, str] | None:
        """Step and path of the newest checkpoint of both; of equal ones that of the first."""
        here = self.first.newest()
        second = self.second
        if second is None:
            return here
        there: list[tuple[int, str] | None] = [None]

        def ask() -> None:
            there[0] = second.newest()

        self._reach(second, ask)
        found = there[0]
        return found if found is not None and (here is None or found[0] > here[0]) else here

    def _reach(self, second: Storage, ask: Callable[[], object]) -> None:
        try:
            ask()
        except ObjectError as error:
            if error.errno in _MISTAKES:
                raise
            here = self.first.newest()
            if here is None:  # beginning anew could not be told from going on
                raise
            log.error("the second tier cannot be reached, the run goes on from %s, and there may be a newer one in %s: "
                      "%s", here[1], second.directory, error)  # fmt: skip
