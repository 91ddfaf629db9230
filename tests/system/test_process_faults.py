"""Savers and ranks that are paused, and ranks that raise: nobody waits too long, and what was staged lands."""

from __future__ import annotations

import atexit
import os
import re
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.system.endurance import LIMIT_S, Training, fault
from tests.system.processes import Daemon, Job, Scenario, run_together, savers, the_saver, until
from tests.system.training import everywhere, full_values, rank, reached, reference, refusal

_HERE = "tests.system.test_process_faults"


def saver_is_paused(folder: str, endpoint: str = "") -> None:
    """For longer than ranks go on without hearing of it: nobody starts a second one, and all that is staged lands."""
    training = Training(Path(folder, "run"), saver=endpoint or None)
    training.good(1)
    dist.barrier()
    pid = the_saver(Path(folder))
    with fault(lambda: os.kill(pid, signal.SIGSTOP), lambda: os.kill(pid, signal.SIGCONT)):
        handle = training.start(2)
        handle.staged()
        assert re.search(
            "step 2 is not committed after 0.1 s; it is staged and goes on", refusal(lambda: handle.wait(0.1))
        )
        until(lambda: any("does not answer" in line for line in training.log), "the warning")
        assert any("What is staged is safe" in line and (endpoint or f"pid {pid}") in line for line in training.log)
        assert savers(Path(folder)) == [pid]
        training.train()
    training.lands(handle)
    training.good(3)
    assert savers(Path(folder)) == [pid]
    training.end()


def paused_saver(folder: Path, *, daemon: bool) -> None:
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        arguments = [stack.enter_context(Daemon(folder / "d", folder)).endpoint] if daemon else []
        with Job(f"{_HERE}:saver_is_paused", 2, folder, *arguments) as job:
            job.wait()


def a_rank_is_paused(folder: str, paused: str) -> None:
    """The others' waits end with its number; when it goes on, what was staged meanwhile is committed.

    Two waits are longer than a client waits before it calls its saver silent: it must not, for it was paused itself.
    """
    training = Training(Path(folder, "run"), slots=1, timeout_s=6.0)
    training.good(1)
    training.train()
    training.expected = reference(values=full_values(training.model))
    dist.barrier()
    if rank() == int(paused):
        reached(folder, f"{os.getpid()}-pauses")
        os.kill(os.getpid(), signal.SIGSTOP)
        handle = training.ckpt.save(2)
        until(lambda: handle.released, "the saver's word on step 2")
        late = training.ckpt.save(3)
    else:
        until(lambda: list(Path(folder).glob("reached-*-pauses")), "the pause")
        handle = training.ckpt.save(2)
        assert f"rank {paused} has not staged it" in refusal(handle.wait)
        assert handle.state == "staging"
        late = training.ckpt.save(3)  # its slot is not free
        assert "slot 0 still holds step 2 after 6 s" in refusal(late.wait)
        Path(folder, "go-on").touch()
    training.lands(handle)
    assert "not saved" in refusal(lambda: late.wait(LIMIT_S))
    assert not any("does not answer" in line for line in training.log)
    stats = everywhere(training.ckpt.stats())
    assert [each["failed"] + each["skipped"] for each in stats] == [1, 1]
    training.good(4)
    training.ckpt.close()
    training.check_directory()


def paused_rank(folder: Path, paused: int) -> None:
    with Job(f"{_HERE}:a_rank_is_paused", 2, folder, str(paused)) as job:
        until((folder / "go-on").exists, "the others have gone on", 60.0)
        os.kill(job.pids[paused], signal.SIGCONT)
        job.wait()


class Mistake(Exception):
    """What a training loop may raise."""


def a_rank_raises(folder: str, who: str, way: str) -> None:
    """While a save is under way that it has staged, and another that it has not."""
    training = Training(Path(folder, "run"))
    training.good(1)
    dist.barrier()
    if rank() == int(who):
        if way == "with":
            with pytest.raises(Mistake), training.ckpt:
                leave(training, folder)
        else:
            with pytest.raises(Mistake):
                leave(training, folder)
            atexit._run_exitfuncs()  # what Python does then
        stats = training.ckpt.stats()
        assert stats["saves"] == 2 == stats["committed"] + stats["failed"]
        assert "after close()" in refusal(lambda: training.ckpt.save(3))
        os._exit(7)
    staged = training.ckpt.save(2)
    until(lambda: list(Path(folder).glob("reached-left")), "the other's end")
    handles = [training.ckpt.save(number) for number in (3, 4)]
    assert staged.wait(LIMIT_S) == training.directory / "checkpoint-2"
    for handle in handles:
        said = refusal(lambda handle=handle: handle.wait(LIMIT_S))
        assert f"rank {who} of 2 closed its checkpointer" in said, said
    training.ckpt.wait()
    training.ckpt.close()
    stats = training.ckpt.stats()
    assert (stats["saves"], stats["committed"], stats["failed"]) == (4, 2, 2)
    os._exit(0)


def leave(training: Training, folder: str) -> None:
    training.ckpt.save(2)
    reached(folder, "left")
    raise Mistake


def raising_rank(folder: Path, who: int, way: str) -> None:
    with Job(f"{_HERE}:a_rank_raises", 2, folder, str(who), way) as job:
        until(lambda: None not in job.statuses, "every rank's end")
        assert job.statuses == [7 if each == who else 0 for each in range(2)], job.printed()
    until(lambda: not savers(folder), "the saver has ended", 30.0)
    assert sorted(os.listdir(folder / "run")) == ["checkpoint-1", "checkpoint-2", "latest"]
    assert os.readlink(folder / "run/latest") == "checkpoint-2"


SCENARIOS: dict[str, Scenario] = {
    "paused_saver-embedded": lambda folder: paused_saver(folder, daemon=False),
    "paused_saver-daemon": lambda folder: paused_saver(folder, daemon=True),
    "paused_rank-0": lambda folder: paused_rank(folder, 0),
    "paused_rank-1": lambda folder: paused_rank(folder, 1),
    **{
        f"raising_rank-{who}-{way}": lambda folder, who=who, way=way: raising_rank(folder, who, way)
        for who in (0, 1)
        for way in ("with", "without")
    },
}
_FULL = ("raising_rank-0-without", "raising_rank-1-with")  # they differ little from another one


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=pytest.mark.full if name in _FULL else ()) for name in SCENARIOS]
)
def test_process_faults(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected}
        results.update(run_together(chosen, folder, at_once=5))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
