"""SIGKILL of trainers and savers at the worst moments: what was staged is committed, whole; the rest leaves no trace.

What a rank does is a function here as well; the scenario of the same name starts it, kills, and looks.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

import async_ckpt
from tests.system.processes import (
    Daemon,
    Job,
    Scenario,
    assert_torch_free,
    run_together,
    runs_of,
    savers,
    the_saver,
    until,
)
from tests.system.training import (
    Checkpointer,
    adamw,
    attach,
    check_checkpoint,
    everywhere,
    full_values,
    keep,
    kept,
    kill_all_ranks,
    rank,
    reached,
    reference,
    refusal,
    sleep_until_killed,
    step,
    wrapped,
)

_HERE = "tests.system.test_kills"
_LIMIT_S = 60.0


class Training:
    """A model in training with saves of which `expected/<step>` in the folder tells what they must hold."""

    def __init__(self, folder: str, kind: str = "fsdp2", saver: str | None = None) -> None:
        self.folder = Path(folder)
        self.model = wrapped(kind)
        self.optimizer = adamw(self.model)
        self.ckpt: Checkpointer = attach(
            self.model, self.optimizer, directory=self.folder / "run", saver=saver, timeout_s=_LIMIT_S
        )

    def step(self) -> None:
        step(self.model, self.optimizer)

    def expect(self, number: int) -> None:
        """Train, and write down what a save of `number` would have to hold."""
        self.step()
        keep(self.folder / "expected" / str(number), reference(values=full_values(self.model)))

    def save(self, number: int) -> async_ckpt.SaveHandle:
        self.expect(number)
        return self.ckpt.save(number)


def committed(folder: Path, number: int) -> None:
    """Assert that `number` is, or becomes, the newest checkpoint, and that it is whole."""
    run = folder / "run"
    until(lambda: async_ckpt.latest(run) == run / f"checkpoint-{number}", f"step {number} committed")
    check_checkpoint(run / f"checkpoint-{number}", kept(folder / "expected" / str(number)), number)


def only(folder: Path, *numbers: int) -> None:
    """Assert that the directory holds nothing else, hidden or not, once no saver works in it any more."""
    until(lambda: not savers(folder), "the saver has ended", 30.0)
    names = [f"checkpoint-{number}" for number in numbers]
    assert sorted(os.listdir(folder / "run")) == sorted([*names, "latest"])
    assert os.readlink(folder / "run" / "latest") == names[-1]


# --- all ranks -----------------------------------------------------------------------------------------------------


def ranks_die_once_staged(folder: str, kind: str) -> None:
    pids = everywhere(os.getpid())
    training = Training(folder, kind)
    handle = training.save(1)
    training.step()
    if rank() == 0:
        handle.staged()
        kill_all_ranks(pids)
    sleep_until_killed()


def all_ranks_after_staged(folder: Path, kind: str) -> None:
    with Job(f"{_HERE}:ranks_die_once_staged", 2, folder, kind) as job:
        job.wait(expected=-signal.SIGKILL)
    committed(folder, 1)
    only(folder, 1)


def saver_is_stopped_while_ranks_die(folder: str) -> None:
    pids = everywhere(os.getpid())
    training = Training(folder)
    dist.barrier()
    if rank() == 0:
        os.kill(the_saver(training.folder), signal.SIGSTOP)
    dist.barrier()
    handle = training.save(1)
    training.step()
    if rank() == 0:
        handle.staged()
        kill_all_ranks(pids)
    sleep_until_killed()


def all_ranks_before_the_saver_has_looked(folder: Path) -> None:
    """The saver hears of nothing before every rank is dead."""
    with Job(f"{_HERE}:saver_is_stopped_while_ranks_die", 2, folder) as job:
        job.wait(expected=-signal.SIGKILL)
    assert not list(folder.glob("run/checkpoint-*"))
    os.kill(the_saver(folder), signal.SIGCONT)
    committed(folder, 1)
    only(folder, 1)


def one_rank_saves(folder: str) -> None:
    pids = everywhere(os.getpid())
    training = Training(folder)
    training.save(1).wait()
    training.expect(2)
    if rank() == 0:
        handle = training.ckpt.save(2)
        until(lambda: handle.copy_s is not None, "our own copy")
        assert handle.state == "staging"
        kill_all_ranks(pids)
    sleep_until_killed()


def all_ranks_with_a_copy_missing(folder: Path) -> None:
    with Job(f"{_HERE}:one_rank_saves", 2, folder) as job:
        job.wait(expected=-signal.SIGKILL)
    only(folder, 1)
    committed(folder, 1)


# --- one rank ------------------------------------------------------------------------------------------------------


def rank_1_dies(folder: str) -> None:
    training = Training(folder)
    training.save(1).wait()
    for number in (2, 3):
        training.expect(number)
    dist.barrier()
    if rank() == 1:
        until(lambda: all(Path(folder, f"reached-saved-{other}").exists() for other in (0, 2)), "the others' saves")
        os.kill(os.getpid(), signal.SIGKILL)
    under_way = training.ckpt.save(2)
    reached(folder, f"saved-{rank()}")
    for handle in (under_way, training.ckpt.save(3)):
        assert "rank 1 of 3" in refusal(handle.wait)
        assert handle.state == "failed"
    training.ckpt.wait()
    training.ckpt.close()
    assert "close" in refusal(lambda: training.ckpt.save(4))
    os._exit(0)  # what is left of gloo cannot meet at a barrier


def one_of_three_ranks(folder: Path) -> None:
    with Job(f"{_HERE}:rank_1_dies", 3, folder) as job:
        until(lambda: None not in job.statuses, "every rank's end")
        assert job.statuses == [0, -signal.SIGKILL, 0], job.printed()
    committed(folder, 1)
    only(folder, 1)


# --- the saver -----------------------------------------------------------------------------------------------------


def saver_dies(folder: str) -> None:
    training = Training(folder)
    handles = [training.save(number) for number in (1, 2)]
    killed = []
    for number in (3, 4):  # killed with a save under way, and, at the second time, stopped before it could see one
        if number == 4:  # a stopped saver frees no slot, and what the killed one had to say may be a ping away
            for handle in handles:
                handle.wait()
        dist.barrier()
        if rank() == 0:
            killed.append(the_saver(training.folder))
            os.kill(killed[-1], signal.SIGSTOP if number == 4 else signal.SIGKILL)
        dist.barrier()
        handles.append(training.save(number))
        handles[-1].staged()
        dist.barrier()
        if rank() == 0 and number == 4:
            assert handles[-1].state == "staged"
            os.kill(killed[-1], signal.SIGKILL)
        training.step()
        assert handles[-1].wait() == training.folder / "run" / f"checkpoint-{number}"
    if rank() == 0:
        pid = the_saver(training.folder)
        assert pid not in killed
        assert_torch_free(pid)
    handles.append(training.save(5))
    training.ckpt.close()
    assert [handle.state for handle in handles] == ["committed"] * 5
    stats = training.ckpt.stats()
    assert (stats["saves"], stats["committed"], stats["failed"]) == (5, 5, 0)


def embedded_saver_twice(folder: Path) -> None:
    with Job(f"{_HERE}:saver_dies", 2, folder) as job:
        job.wait()
    for number in range(1, 6):
        check_checkpoint(folder / f"run/checkpoint-{number}", kept(folder / "expected" / str(number)), number)
    only(folder, 1, 2, 3, 4, 5)


def everybody_dies(folder: str, saver: str = "") -> None:
    pids = everywhere(os.getpid())
    training = Training(folder, saver=saver or None)
    training.save(1).wait()
    dist.barrier()
    if rank() == 0:
        pid = int(Path(saver.removeprefix("ipc://") + ".lock").read_text()) if saver else the_saver(training.folder)
        os.kill(pid, signal.SIGSTOP)
    dist.barrier()
    handle = training.save(2)
    if rank() == 0:
        handle.staged()
        os.kill(pid, signal.SIGKILL)
        kill_all_ranks(pids)
    sleep_until_killed()


def resumes(folder: str) -> None:
    training = Training(folder, "fsdp1")
    resumed = training.ckpt.restore()
    assert resumed is not None
    assert resumed.step == 2
    values = full_values(training.model)
    if rank() == 0:
        expected = kept(training.folder / "expected" / "2")
        assert reference(values=values)["adapter_model.safetensors"] == expected["adapter_model.safetensors"]
    training.save(3)
    training.ckpt.close()


def saver_and_ranks_then_a_new_job(folder: Path) -> None:
    with Job(f"{_HERE}:everybody_dies", 2, folder) as job:
        job.wait(expected=-signal.SIGKILL)
    assert not savers(folder)
    assert async_ckpt.latest(folder / "run") == folder / "run/checkpoint-1"
    with Job(f"{_HERE}:resumes", 3, folder) as job:
        job.wait()
    check_checkpoint(folder / "run/checkpoint-2", kept(folder / "expected/2"), 2)
    committed(folder, 3)
    only(folder, 1, 2, 3)


def daemon_and_ranks_then_a_new_daemon(folder: Path) -> None:
    first = Daemon(folder / "d", folder, "--keep-image-s", "1").up()
    with Job(f"{_HERE}:everybody_dies", 2, folder, first.endpoint) as job:
        job.wait(expected=-signal.SIGKILL)
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    assert async_ckpt.latest(folder / "run") == folder / "run/checkpoint-1"
    with Daemon(folder / "d", folder, "--keep-image-s", "1") as second:
        committed(folder, 2)
        assert_torch_free(second.process.pid)
        assert len(runs_of(folder / "run")) == 1
        until(lambda: not runs_of(folder / "run"), "the dead job's last image is dropped", 30.0)
    only(folder, 1, 2)


SCENARIOS: dict[str, Scenario] = {
    "all_ranks_after_staged-fsdp2": lambda folder: all_ranks_after_staged(folder, "fsdp2"),
    "all_ranks_after_staged-fsdp1": lambda folder: all_ranks_after_staged(folder, "fsdp1"),
    **{
        scenario.__name__: scenario
        for scenario in (
            all_ranks_before_the_saver_has_looked,
            all_ranks_with_a_copy_missing,
            one_of_three_ranks,
            embedded_saver_twice,
            saver_and_ranks_then_a_new_job,
            daemon_and_ranks_then_a_new_daemon,
        )
    },
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kills(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected}
        results.update(run_together(chosen, folder, at_once=5))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
