"""What ranks say to a saver that has found their run and does not know yet what lies on its storage."""

from __future__ import annotations

from async_ckpt.core.protocol import FromRank, Ping

_KEPT_A_RANK = 8


class EarlyWords:
    """They mean something only when journal and disk are known: a step that was told to have failed may be reported
    again. In order; what is too much is not kept, for a rank says again what nobody has acknowledged."""

    def __init__(self, world: int) -> None:
        self._limit = _KEPT_A_RANK * world
        self.kept: list[tuple[int, FromRank | None]] = []  # None: the rank is dead, which is said once

    def keep(self, rank: int, message: FromRank | None) -> bool:
        """False for a word that can be answered at once."""
        if isinstance(message, Ping):
            return False
        if message is None or len(self.kept) < self._limit:
            self.kept.append((rank, message))
        return True
