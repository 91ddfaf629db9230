"""Ranks that are told to end: all of them stop after the same step, and it is committed, whoever was told and when.

What a rank does is a function here as well; the scenario of the same name starts it, signals, and looks. Ranks signal
themselves at named points of a step, so "at different times" is the same in every run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.ranks import ROOT
from tests.system.processes import Daemon, Job, Scenario, environment, run_together, savers, the_saver, until
from tests.system.training import (
    Checkpointer,
    adamw,
    attach,
    check_checkpoint,
    collectives,
    forward,
    full_values,
    rank,
    reached,
    reference,
    wrapped,
)

_HERE = "tests.system.test_preemption"
_ENOUGH = 60  # steps of a training that nobody stops


class Loop:
    """A training loop as users write it, on one rank. `notices`: "<rank>:<step>:<point>", where that rank gets a
    signal: "before" or "amid" the optimizer step, or "after" it and what the loop did with it."""

    def __init__(self, folder: str, kind: str, notices: str, number: int = signal.SIGTERM, **options: Any) -> None:
        self.folder, self.number = Path(folder), number
        self.notices = {tuple(each.split(":")) for each in notices.split()}
        self.model = wrapped(kind)
        self.optimizer = adamw(self.model)
        self.history: dict[int, dict[str, bytes]] = {}
        self.ckpt: Checkpointer = attach(
            self.model, self.optimizer, directory=self.folder / "run", preemption=True, timeout_s=60, **options
        )
        self.resumed = self.ckpt.restore()

    def point(self, step_number: int, name: str) -> None:
        if (str(rank()), str(step_number), name) in self.notices:
            os.kill(os.getpid(), self.number)

    def train(self, each: Callable[[int], bool], steps: int = _ENOUGH) -> int:
        """Until `each` says so; the last step."""
        first = self.resumed.step + 1 if self.resumed else 0
        for number in range(first, steps):
            self.point(number, "before")
            forward(self.model).backward()
            self.point(number, "amid")
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.history[number] = reference(values=full_values(self.model))
            if number == 2:
                reached(self.folder, f"training-{rank()}")
            before = collectives()
            ended = each(number)
            assert collectives() == before
            self.point(number, "after")
            if ended:
                break
        return number

    def finish(self, last: int) -> None:
        """Close, check every checkpoint, and tell the test where this rank stopped."""
        self.ckpt.close()
        dist.barrier()
        found = sorted(int(path.name.split("-")[1]) for path in (self.folder / "run").glob("checkpoint-*"))
        if rank() == 0:
            for number in found:
                if number in self.history:
                    check_checkpoint(self.folder / f"run/checkpoint-{number}", self.history[number], number)
        outcome = {"last": last, "preempted": self.ckpt.preempted, "found": found}
        (self.folder / f"outcome-{rank()}").write_text(json.dumps(outcome))


def outcomes(job: Job) -> list[dict[str, Any]]:
    return [json.loads((job.folder / f"outcome-{rank}").read_text()) for rank in range(job.world)]


def agreed(job: Job, signalled: int) -> int:
    """The optimizer steps after which all ranks stopped; the first signal came after `signalled` had begun."""
    printed = "".join(log.read_text() for log in job.logs)
    promised = [int(count) for count in re.findall(r"SIG\w+ received after (\d+) optimizer steps", printed)]
    stops = [int(count) for count in re.findall(r"all ranks stop after optimizer step (\d+)", printed)]
    committed = re.findall(r"is committed, ([\d.]+) s after the notice", printed)
    assert len(promised) > 0
    assert len(stops) == len(committed) == job.world, printed
    assert len(set(stops)) == 1, stops
    first, stop = min(promised), stops[0]
    print(f"{job.folder.name}: signal after {signalled} steps, promise after {first}, stop after {stop}, "
          f"committed {max(map(float, committed))} s after the notice")  # fmt: skip
    # The client's thread wakes at once, though on a busy machine steps are faster. From its promise on this rank begins
    # one more step, and the others, which cannot go on without it, two; all stop after the next one.
    assert signalled <= first <= signalled + 20
    assert first < stop <= first + 3
    return stop


def saves_and_leaves(folder: str, kind: str, notices: str, number: str = "15") -> None:
    loop = Loop(folder, kind, notices, int(number))

    def each(step_number: int) -> bool:
        if step_number % 100 == 99 or loop.ckpt.preempted:
            loop.ckpt.save(step_number, metrics={"step": step_number})
        return loop.ckpt.preempted

    loop.finish(loop.train(each))


def leaves(folder: str, kind: str, notices: str, saver: str = "") -> None:
    loop = Loop(folder, kind, notices, saver=saver or None)
    loop.finish(loop.train(lambda step_number: loop.ckpt.preempted))


def never_asks(folder: str, kind: str, notices: str, number: str) -> None:
    """It saves every fourth step, and once more at its end."""
    loop = Loop(folder, kind, notices, int(number))

    def each(step_number: int) -> bool:
        if step_number % 4 == 1 or step_number == 39:
            loop.ckpt.save(step_number)
        return False

    loop.finish(loop.train(each, 40))


def pauses_the_saver(folder: str, kind: str, notices: str) -> None:
    """Nobody answers when the signal comes; the test kills the saver."""
    loop = Loop(folder, kind, notices)

    def each(step_number: int) -> bool:
        if step_number == 3 and rank() == 0:
            os.kill(the_saver(loop.folder), signal.SIGSTOP)
        return loop.ckpt.preempted

    loop.finish(loop.train(each))


def four_ranks_at_different_times(folder: Path) -> None:
    """And a job that comes after them goes on behind the step where they stopped."""
    notices = "2:5:amid 0:5:after 3:6:before 1:6:amid"
    with Job(f"{_HERE}:saves_and_leaves", 4, folder, "fsdp2", notices) as job:
        job.wait()
    stop = agreed(job, 5)
    assert outcomes(job) == [{"last": stop - 1, "preempted": True, "found": [stop - 1]}] * 4
    with Job(f"{_HERE}:saves_and_leaves", 4, folder, "fsdp2", f"0:{stop + 2}:amid") as job:
        job.wait()
    assert outcomes(job)[0]["found"][0] == stop - 1
    assert outcomes(job)[0]["last"] > stop + 2


def one_of_four(folder: Path) -> None:
    """The loop only leaves; what it does not save is saved when it closes."""
    with Job(f"{_HERE}:leaves", 4, folder, "fsdp2", "3:4:after") as job:
        job.wait()
    stop = agreed(job, 5)
    assert outcomes(job) == [{"last": stop - 1, "preempted": True, "found": [stop - 1]}] * 4


def slurm_and_a_loop_that_never_asks(folder: Path) -> None:
    """The step is saved before the next one overwrites it, under the number that the loop would have given."""
    with Job(f"{_HERE}:never_asks", 2, folder, "ddp", "1:6:amid", str(int(signal.SIGUSR1))) as job:
        job.wait()
    stop = agreed(job, 6)
    found = sorted({*range(1, 40, 4), 39, stop - 1})
    assert outcomes(job) == [{"last": 39, "preempted": True, "found": found}] * 2


def saver_killed_before_it_has_agreed(folder: Path) -> None:
    """Ranks wait at the step that they promised, and a new saver hears it all again."""
    with Job(f"{_HERE}:pauses_the_saver", 2, folder, "fsdp1", "0:5:amid") as job:
        until(lambda: "SIGTERM received" in job.logs[0].read_text() or any(job.statuses), "the signal is handled")
        os.kill(the_saver(folder), signal.SIGKILL)
        job.wait()
    stop = agreed(job, 5)
    assert outcomes(job) == [{"last": stop - 1, "preempted": True, "found": [stop - 1]}] * 2


def everything_of_a_pod_at_once(folder: Path) -> None:
    """The daemon is told to end first, and stays until its ranks have left."""
    daemon = Daemon(folder / "d", folder).up()
    with Job(f"{_HERE}:leaves", 2, folder, "fsdp2", "", daemon.endpoint) as job:
        for number in range(2):
            job.reach(f"training-{number}")
        daemon.process.send_signal(signal.SIGUSR1)  # Slurm tells every process of a job
        daemon.process.send_signal(signal.SIGTERM)
        until(lambda: "serving the ranks" in daemon.log.read_text(), "the daemon has heard")
        for pid in job.pids:
            os.kill(pid, signal.SIGTERM)
        job.wait()
    (found,) = outcomes(job)[0]["found"]
    assert outcomes(job) == [{"last": found, "preempted": True, "found": [found]}] * 2
    assert daemon.process.wait(20) == -signal.SIGTERM
    assert not daemon.socket.exists()


def trained_by_torchrun(folder: str) -> None:
    """One rank, as torchrun starts it."""
    dist.init_process_group("gloo")
    leaves(folder, "fsdp2", "")
    sys.stdout.flush()
    os._exit(0)


def torchrun_is_told(folder: Path) -> None:
    """Its agent passes the signal on, and kills what has not ended after 30 s; the saver is nobody it knows."""
    _torchrun(folder, signal.SIGTERM)


def torchrun_is_told_by_slurm(folder: Path) -> None:
    """SIGUSR1 is passed on like SIGTERM if torchrun is told to handle it; it would end the agent at once else."""
    _torchrun(folder, signal.SIGUSR1, "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")


def _torchrun(folder: Path, number: int, *options: str) -> None:
    code = f"from tests.system.test_preemption import trained_by_torchrun; trained_by_torchrun({str(folder)!r})"
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(code)
    log = folder / "torchrun.log"
    with log.open("wb") as output:
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *options,
             str(script)],
            env=environment(), cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: all((folder / f"reached-training-{rank}").exists() for rank in range(2))
              or agent.poll() is not None, "ranks in training", 120.0)  # fmt: skip
        saver = the_saver(folder)
        os.killpg(agent.pid, number)  # as a service manager does: the whole group
        agent.wait(60)
    finally:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
    printed = log.read_text(errors="replace")
    said = [json.loads((folder / f"outcome-{rank}").read_text()) for rank in range(2)]
    stops = re.findall(r"all ranks stop after optimizer step (\d+)", printed)
    assert len(stops) == 2, printed
    assert len(set(stops)) == 1
    assert said == [{"last": int(stops[0]) - 1, "preempted": True, "found": [int(stops[0]) - 1]}] * 2, printed
    until(lambda: saver not in savers(folder), "the saver has ended by itself", 30.0)
    logs = [path.read_text() for path in folder.parent.parent.rglob("saver.log*")]
    (ours,) = [text for text in logs if f"saver {saver} serves" in text]
    assert f"saver {saver} ends" in ours
    assert "signal" not in ours


def nobody_answers(folder: Path) -> None:
    """One rank's saver is stopped for good: training goes on after a bounded wait."""
    daemon = Daemon(folder / "d", folder).up()
    with Job(f"{_HERE}:goes_on_without_an_answer", 2, folder, "ddp", daemon.endpoint) as job:
        job.reach("ready")
        os.kill(daemon.process.pid, signal.SIGSTOP)
        (folder / "go").touch()
        job.reach("went-on")
        os.kill(daemon.process.pid, signal.SIGCONT)
        job.wait()
    printed = job.printed()
    assert printed.count("training goes on") == 2, printed
    (found,) = outcomes(job)[0]["found"]
    assert outcomes(job) == [{"last": found, "preempted": True, "found": [found]}] * 2
    assert daemon.stop() == -signal.SIGTERM


def goes_on_without_an_answer(folder: str, kind: str, saver: str) -> None:
    """Both ranks are signalled while no saver answers. When one does again, they agree after all."""
    loop = Loop(folder, kind, "0:3:after 1:3:after", saver=saver)

    def each(step_number: int) -> bool:
        if step_number == 3:
            reached(folder, "ready")
            until(Path(folder, "go").exists, "the test's word")
        if step_number == 6:
            reached(folder, "went-on")
        return loop.ckpt.preempted

    # The agreement takes a moment, and steps are short: it is not known which step it will be.
    loop.finish(loop.train(each, 100_000))


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        four_ranks_at_different_times,
        one_of_four,
        slurm_and_a_loop_that_never_asks,
        saver_killed_before_it_has_agreed,
        everything_of_a_pod_at_once,
        torchrun_is_told,
        torchrun_is_told_by_slurm,
        nobody_answers,
    )
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


# That torchrun passes other signals on as well is torchrun's; what we do at SIGUSR1 is tried without it.
_FULL = {torchrun_is_told_by_slurm.__name__}


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=pytest.mark.full if name in _FULL else ()) for name in SCENARIOS]
)
def test_preemption(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected}
        results.update(run_together(chosen, folder, at_once=3))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
