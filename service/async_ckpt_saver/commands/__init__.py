"""The verbs of the command line, one module each, which is imported when the verb, or the list of all, is asked for.

What only the work needs (asyncio, zmq, msgspec, rich) is imported inside `run`, so that help is quick.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Protocol, cast


class Command(Protocol):
    """One verb. `HELP` is its line in the list of verbs, `EXAMPLE` a command that works as it is typed.

    `run` answers with one of `exit_codes`; it raises CheckpointError or OSError for what could not be done, and
    `settings.SettingsError` for wrong input.
    """

    HELP: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int: ...


# In the order of the help.
GROUPS: dict[str, tuple[str, ...]] = {
    "the saver": ("run", "status", "config", "doctor", "keygen"),
    "checkpoints": ("ls", "show", "diff", "verify", "gc"),
    "this program": ("completion",),
}
VERBS = tuple(verb for verbs in GROUPS.values() for verb in verbs)


def load(verb: str) -> Command:
    return cast(Command, importlib.import_module(f".{verb}", __name__))
