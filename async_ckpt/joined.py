"""What a Checkpointer is made of: the user's choices, and the run that all ranks have joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_ckpt.core.location import Location
from async_ckpt.core.manifest import MANIFEST_NAME, checkpoint_name
from async_ckpt.core.protocol import Started

from .client import Client
from .hosts import Hosts
from .plan import Plan
from .staging import Staging


@dataclass(frozen=True)
class Settings:
    """What the user chose, as far as a Checkpointer needs it. `directory` is absolute; `given` is how the user named
    it, and names the paths that are returned. `saver` says in an error where to look next. `second`: the second tier,
    to which committed checkpoints are copied."""

    directory: Location
    given: Location
    rank: int
    when_busy: Literal["wait", "skip"]
    timeout_s: float
    saver: str
    second: Location | None = None

    def place_of(self, step: int) -> Location:
        """Where the checkpoint of a step is: in the directory, unless only the second tier has it."""
        path = self.directory / checkpoint_name(step)
        if self.second is None or path.is_dir():
            return path
        there = self.second / checkpoint_name(step)
        return there if (there / MANIFEST_NAME).exists() else path


@dataclass(frozen=True)
class Joined:
    """A run that every rank has joined; `hosts` where there are several."""

    plan: Plan
    staging: Staging
    client: Client
    started: Started
    hosts: Hosts | None = None
