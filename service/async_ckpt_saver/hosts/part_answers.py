"""Has every host written its part? Of the lead `Answers`, of a relay `Asked`. Pure: no I/O, no clock, no sockets.

    lead   asks each host --all have written--> complete
                 +--one has failed, or is lost--> failed; what is heard after that changes nothing
    relay  idle --asked--> writing --> done (its answer is said again to whoever asks again)
                 +-- asked for another attempt: what it writes for the one before is given up

An attempt is named by its hidden directory, which no other attempt ever has. So an answer cannot be taken for one of
another attempt, and what a relay still writes for one that was given up goes to files that nobody commits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from .link_words import PartFailed, PartWritten, WritePart


class Failure(msgspec.Struct, frozen=True):
    """`code` is the system's, 0 for none."""

    host: str
    reason: str
    code: int = 0


class Answers:
    """Of one attempt: how many pieces each host has."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = counts
        self.hashes: dict[str, Sequence[int]] = {}
        self.failure: Failure | None = None

    @property
    def complete(self) -> bool:
        return self.failure is None and len(self.hashes) == len(self._counts)

    @property
    def waiting(self) -> list[str]:
        """The hosts that are to answer yet; of a failed attempt nobody is."""
        return [] if self.failure is not None else [host for host in self._counts if host not in self.hashes]

    def written(self, host: str, hashes: Sequence[int]) -> None:
        if host not in self.waiting:
            return
        if len(hashes) != self._counts[host]:
            self.failed(Failure(host, f"it gives {len(hashes)} hashes for {self._counts[host]} pieces"))
        else:
            self.hashes[host] = hashes

    def failed(self, failure: Failure) -> None:
        """That host has not written its part, or will not be heard again."""
        if failure.host in self.waiting:
            self.failure = failure


class Asked:
    """What a relay writes for one run: one step at a time is committed, so the last one asked for is what counts."""

    def __init__(self) -> None:
        self._word: WritePart | None = None
        self._answer: PartWritten | PartFailed | None = None

    def ask(self, word: WritePart) -> Literal["write", "writing"] | PartWritten | PartFailed:
        """What to do about it."""
        if self._word is not None and self._word.name == word.name:
            return self._answer or "writing"
        self._word, self._answer = word, None
        return "write"

    def current(self, name: str) -> bool:
        """Whether it is still of use to write there."""
        return self._word is not None and self._word.name == name

    def done(self, answer: PartWritten | PartFailed) -> bool:
        """Whether it is to be said."""
        if not self.current(answer.name):
            return False
        self._answer = answer
        return True

    def over(self, step: int | None = None) -> None:
        """That step has its outcome; None: so has every step."""
        if self._word is not None and step in (None, self._word.step):
            self._word = self._answer = None
