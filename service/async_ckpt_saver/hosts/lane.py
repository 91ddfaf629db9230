"""Words in order over a connection that may lose some when it is made anew. Pure: no socket, no clock.

Guarantee: while beats come through, every word that is `put` is taken by the other end once, and in order. A connection
keeps the order of what it does deliver. So who hears a word or a beat knows what is missing before it, and asks for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from .link_words import Beat, Missing, Said, encode_word

Payload: TypeAlias = bytes | memoryview
WINDOW_BYTES = 32 << 20


class Entry(msgspec.Struct, frozen=True):
    """A word as it is sent, and the bytes that go with it."""

    seq: int
    word: bytes
    payload: Payload | None

    @property
    def size_bytes(self) -> int:
        return len(self.word) + (len(self.payload) if self.payload is not None else 0)


class Lane:
    """One end of one lane, both directions. No more than `window_bytes` are on their way; a larger word goes alone."""

    def __init__(self, window_bytes: int = WINDOW_BYTES) -> None:
        self.sent = 0
        self.received = 0
        self._window_bytes = window_bytes
        self._put = 0
        self._waiting: deque[Entry] = deque()
        self._unheard: deque[Entry] = deque()
        self._unheard_bytes = 0
        self._complained = -1
        self._told = 0

    # --- what this end says ------------------------------------------------------------------------------------------

    @property
    def room(self) -> bool:
        """Whether what is put now would go out at once."""
        return not self._waiting and self._unheard_bytes < self._window_bytes

    @property
    def idle(self) -> bool:
        """Everything that was put has been heard."""
        return not self._waiting and not self._unheard

    def put(self, word: Said, payload: Payload | None = None) -> None:
        self._put += 1
        self._waiting.append(Entry(self._put, encode_word(msgspec.structs.replace(word, seq=self._put)), payload))

    def take(self) -> Iterator[Entry]:
        """What is to be sent now."""
        while self._waiting and (self._unheard_bytes < self._window_bytes or not self._unheard):
            entry = self._waiting.popleft()
            self._unheard.append(entry)
            self._unheard_bytes += entry.size_bytes
            self.sent = entry.seq
            yield entry

    # --- what it hears -----------------------------------------------------------------------------------------------

    def hear(self, seq: int) -> bool:
        """Whether the word `seq` is the next one: else it is dropped, said twice or said too early."""
        if seq == self.received + 1:
            self.received = seq
            return True
        return False

    def complaint(self, ahead: int) -> Missing | None:
        """After a word or a beat that says that all up to `ahead` were sent: what to answer, once for each gap."""
        if ahead <= self.received or self._complained == self.received:
            return None
        self._complained = self.received
        return Missing(received=self.received)

    def hear_beat(self, beat: Beat) -> Missing | None:
        """The other end has heard up to `received`."""
        self._heard(beat.received)
        self._complained = -1  # a complaint may have been lost as well
        return self.complaint(beat.sent)

    def hear_missing(self, missing: Missing) -> None:
        """Say everything after it again."""
        self._heard(missing.received)
        self._waiting.extendleft(reversed(self._unheard))
        self._unheard.clear()
        self._unheard_bytes = 0
        self.sent = self._waiting[0].seq - 1 if self._waiting else self._put

    def beat(self) -> Beat:
        self._told = self.received
        return Beat(sent=self.sent, received=self.received)

    @property
    def owes_beat(self) -> bool:
        """Words were heard that the other end does not know to be heard."""
        return self._told < self.received

    def _heard(self, received: int) -> None:
        if received > self._put:
            return  # whoever says so has not heard it from here
        while self._unheard and self._unheard[0].seq <= received:
            self._unheard_bytes -= self._unheard.popleft().size_bytes
        while self._waiting and self._waiting[0].seq <= received:  # it was about to be said again
            self.sent = self._waiting.popleft().seq
