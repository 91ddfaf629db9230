"""Why what a rank says makes no sense of a rank that was granted its run."""

from __future__ import annotations

from async_ckpt.core.protocol import Bye, Failed, FromRank, Ping, Promise, Ready, Skipped, Staged

# Made once: `|` makes a new object each time, which takes longer than to look for a class in it.
_REPORTS = (Staged, Skipped, Failed)
_OTHER_WORDS = (Ping, Ready, Bye, Promise)


def objection(message: FromRank, *, started: bool, slots: int) -> str | None:
    """None if some rank of a run with so many slots can have meant it."""
    if isinstance(message, _REPORTS):
        if not started:
            return f"step {message.step} before the run has started"
        if message.slot >= slots:
            return f"slot {message.slot} of {slots}"
    elif not isinstance(message, _OTHER_WORDS):
        return f"a {type(message).__name__} of a rank that was granted its run"
    return None
