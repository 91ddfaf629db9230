"""What has arrived of the step that a remote rank hands over. Pure: no I/O, no clock, no sockets.

Guarantee: a step is complete when each of its pieces was taken once, whatever was repeated or came in another order;
pieces of any other step are not taken.
"""

from __future__ import annotations

from .link_words import Offer


class Incoming:
    """Of one rank, whose steps have `count` pieces each."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._arrived = bytearray()
        self._missing = 0
        self.offer: Offer | None = None

    def begin(self, offer: Offer) -> None:
        """What had arrived of another offer, or of the same, is forgotten: all of it comes again."""
        self.offer = offer
        self._arrived = bytearray(self._count)
        self._missing = self._count

    def expects(self, step: int, number: int) -> bool:
        """Whether the piece is to be taken."""
        known = self.offer is not None and self.offer.step == step
        return known and 0 <= number < self._count and not self._arrived[number]

    def took(self, number: int) -> None:
        self._arrived[number] = 1
        self._missing -= 1

    @property
    def complete(self) -> Offer | None:
        """The offer, once all of it is here."""
        return self.offer if self.offer is not None and not self._missing else None

    def end(self) -> None:
        self.offer = None
        self._arrived = bytearray()
