"""Ranks of which the lead has to hear that they are gone, also if it cannot be reached now, or if the saver that served
them was killed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .link_words import Left


class Farewells:
    """`say` reaches the lead or nobody, so what it says is said again whenever a session begins, until the lead answers
    that it does not know the rank."""

    def __init__(self, say: Callable[[Left], None]) -> None:
        self._say = say
        self._awaited: dict[bytes, float] = {}
        self._gone: set[bytes] = set()

    def __bool__(self) -> bool:
        return bool(self._awaited or self._gone)

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._awaited or identity in self._gone

    def expect(self, identities: Iterable[bytes], now_s: float) -> None:
        """An earlier saver had granted these a run that did not come to start: who lives attaches anew."""
        self._awaited.update(dict.fromkeys(identities, now_s))

    def back(self, identity: bytes) -> None:
        self._awaited.pop(identity, None)
        self._gone.discard(identity)

    def gone(self, identity: bytes) -> None:
        self._awaited.pop(identity, None)
        self._gone.add(identity)
        self._say(Left(identity=identity))

    def answered(self, identity: bytes) -> None:
        """The lead does not know it."""
        self._gone.discard(identity)

    def session_began(self) -> None:
        for identity in self._gone:
            self._say(Left(identity=identity))

    def tick(self, now_s: float, silent_s: float, lease_s: float) -> None:
        """Who does not come back within a lease is taken for gone. Of a lead that has been silent for one nobody waits
        for an answer: it has given them up, or is gone itself."""
        for identity, since_s in list(self._awaited.items()):
            if now_s - since_s > lease_s:
                self.gone(identity)
        if silent_s > lease_s:
            self._gone.clear()
