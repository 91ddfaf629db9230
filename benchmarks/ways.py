"""The ways of saving, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from . import ours, peers
from .shapes import Subject


class Way(Protocol):
    """One way of saving `subject`, called as its own documentation says.

    Every rank calls the same methods. `save` returns as early as this way lets the training go on; after `fence` the
    parameters may be written to; `wait` returns when the checkpoint is what this way calls written. `target` is a
    directory that does not exist yet. `detached` are the pids of helpers that are no children of this process.
    """

    title: str
    durable: bool  # synced to the device when `wait` returns

    def setup(self, subject: Subject, folder: Path) -> None: ...

    def save(self, target: Path) -> None: ...

    def fence(self) -> None: ...

    def wait(self) -> None: ...

    def detached(self) -> list[int]: ...

    def teardown(self) -> None: ...


WAYS: dict[str, Callable[[], Way]] = {
    "gather": peers.Gather,
    "dcp.save": peers.DcpSave,
    "dcp.async": peers.DcpAsync,
    "dcp.async-staging": peers.DcpAsyncStaging,
    "dcp.process": peers.DcpProcess,
    "dcp.hf": peers.DcpHuggingFace,
    "torch-checkpointing": peers.TorchCheckpointing,
    "overlap": ours.Overlap,
    "sync": ours.Sync,
    "buffered": ours.Buffered,
}
