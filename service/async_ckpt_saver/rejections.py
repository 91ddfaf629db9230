"""What was not let in, counted by cause; said in the log without filling it."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal, get_args

log = logging.getLogger(__name__)

Cause = Literal[
    "unreadable",  # no message of a rank: truncated, oversized in a field, of another version, noise
    "unexpected",  # a message whose sender is unknown, or that makes no sense now
    "limit",  # more than a cap allows (`async_ckpt.core.limits`)
    "foreign_user",  # a process of another user
    "foreign_host",  # a rank that does not see this saver's shared memory
    "unknown_key",  # a CURVE key that is not on the list
    "handshake",  # a peer that does not speak CURVE, or does not know the saver's key
    "internal",  # a message that could not be handled: an error of ours
]


class Rejections:
    """`counts` has every cause from the start, so that a reader sees zeros."""

    def __init__(self) -> None:
        self.counts: Counter[Cause] = Counter(dict.fromkeys(get_args(Cause), 0))

    def count(self, cause: Cause, reason: str) -> None:
        """The first ten of a cause are logged, then the 100th, the 1000th, ..."""
        self.counts[cause] += 1
        number = self.counts[cause]
        if number <= 10 or (number % 100 == 0 and set(str(number)[1:]) == {"0"} and str(number)[0] == "1"):
            log.warning("rejected (%s, number %d): %.300s", cause, number, reason)
