"""A Trainer that resumes waits until what a killed run had staged is committed: also on a host whose saver relays, and
which knows no more than the cells of its own ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import Lead, Options, Started
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import Peer, Phase, RunRecord, SlotPaths, StateFile, new_run_path, remove_run, write_journal
from async_ckpt.integrations import common

_LEAD = Lead("tcp://192.0.2.1:5591", b"", b"", b"")
_STEP = 7


class Left:
    """A run of four ranks in shared memory, those in `ranks` on this host, as a killed job leaves it."""

    def __init__(self, directory: Path, ranks: tuple[int, ...], lead: Lead | None) -> None:
        self.ranks = ranks
        self.path = new_run_path(f"ipc://{directory}/saver.sock")
        self.path.mkdir(mode=0o700)
        process = process_of(os.getpid())
        options = Options(str(directory), 4, 1, Policy(), 60.0)
        peers = [Peer(rank, bytes([rank]), process) for rank in ranks]
        write_journal(
            self.path, RunRecord("job", options, [], peers, None, {}, Started(resume=None, newest_step=None), lead)
        )
        StateFile.create(SlotPaths(self.path, 0).state, 4)
        self.state = StateFile(SlotPaths(self.path, 0).state)

    def stage(self, *ranks: int) -> None:
        for rank in ranks:
            self.state.mark(rank, Phase.STAGED, _STEP)

    def remove(self) -> None:
        self.state.close()
        remove_run(self.path)


@pytest.fixture(params=["one host", "relay"])
def left(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Left]:
    made = Left(tmp_path, (0, 1, 2, 3), None) if request.param == "one host" else Left(tmp_path, (2, 3), _LEAD)
    yield made
    made.remove()


def looks(left: Left, directory: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the waiting looks in vain; the saver commits behind the third time."""
    waited: list[float] = []

    def sleep(duration_s: float) -> None:
        waited.append(duration_s)
        if len(waited) == 3:
            left.state.settle(_STEP)

    monkeypatch.setattr(time, "sleep", sleep)
    common.wait_for_staged(directory)
    return len(waited)


def test_it_waits_until_what_all_ranks_have_staged_is_committed(
    left: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left.stage(*left.ranks)
    assert looks(left, tmp_path, monkeypatch) == 3


def test_it_does_not_wait_for_what_no_saver_will_commit(
    left: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left.stage(3)
    assert looks(left, tmp_path, monkeypatch) == 0


def test_another_directory_is_no_reason_to_wait(left: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left.stage(*left.ranks)
    assert looks(left, tmp_path / "another", monkeypatch) == 0
