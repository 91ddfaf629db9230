"""One saver for many runs: `async-ckpt-saver run`, as an operator starts and stops it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

import async_ckpt
from async_ckpt.core.transport import SECRET_VARIABLE, SERVER_VARIABLE
from tests.saver.doors import Doors
from tests.system.processes import Daemon, Job, Scenario, assert_torch_free, run_together, runs_of, savers, until
from tests.system.training import (
    adamw,
    attach,
    check_checkpoint,
    full_values,
    keep,
    kept,
    reached,
    reference,
    step,
    wrapped,
)

_HERE = "tests.system.test_daemon"


def saves(folder: str, kind: str, endpoint: str, *pauses: str) -> None:
    """Steps 1 to 3. Before a step named in `pauses`, wait until the test lets it go on."""
    directory = Path(folder, "run")
    model = wrapped(kind)
    optimizer = adamw(model)
    ckpt = attach(model, optimizer, directory=directory, saver=endpoint or None, timeout_s=60)
    handles = []
    for number in (1, 2, 3):
        step(model, optimizer)
        keep(Path(folder, "expected", str(number)), reference(values=full_values(model)))
        if f"before-{number}" in pauses:
            dist.barrier()
            reached(folder, f"before-{number}")
            until(Path(folder, f"go-{number}").exists, "the test's word")
        handles.append(ckpt.save(number))
        step(model, optimizer)
        if f"staged-{number}" in pauses:
            handles[-1].staged()
            dist.barrier()
            reached(folder, f"staged-{number}")
            step(model, optimizer)
        if not pauses:
            assert handles[-1].wait() == directory / f"checkpoint-{number}"
    assert [handle.wait().name for handle in handles] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    ckpt.close()
    dist.barrier()
    assert (ckpt.stats()["saves"], ckpt.stats()["committed"]) == (3, 3)


def check_run(folder: Path) -> None:
    run = folder / "run"
    assert sorted(os.listdir(run)) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "latest"]
    assert async_ckpt.latest(run) == run / "checkpoint-3"
    for number in (1, 2, 3):
        check_checkpoint(run / f"checkpoint-{number}", kept(folder / "expected" / str(number)), number)


def check_ended(daemon: Daemon, number: int = signal.SIGTERM) -> None:
    """The status tells the signal; nobody finds a socket where no saver is."""
    assert daemon.stop(number) == -number
    assert not daemon.socket.exists()
    assert "ends" in daemon.log.read_text()


def two_runs_at_once(folder: Path) -> None:
    daemon = Daemon(folder / "d", folder).up()
    pauses = ("before-2", "staged-3")
    with (
        Job(f"{_HERE}:saves", 2, folder / "a", "fsdp2", daemon.endpoint, *pauses) as a,
        Job(f"{_HERE}:saves", 3, folder / "b", "fsdp1", daemon.endpoint, *pauses) as b,
    ):
        a.reach("before-2")
        b.reach("before-2")
        assert len(runs_of(folder)) == 2
        for job in (a, b):
            (job.folder / "go-2").touch()
        a.wait()
        b.wait()
    assert savers(folder) == [daemon.process.pid]
    assert_torch_free(daemon.process.pid)
    until(lambda: not runs_of(folder), "closed runs are out of shared memory", 30.0)
    check_run(folder / "a")
    check_run(folder / "b")
    check_ended(daemon)


def second_daemon_on_one_endpoint(folder: Path) -> None:
    """It leaves the first one and its socket alone."""
    with Daemon(folder / "d", folder) as first:
        second = Daemon(folder / "d", folder)
        assert second.process.wait(60) == 3
        assert f"pid {first.process.pid}" in first.log.read_text()
        assert first.process.poll() is None
        assert first.socket.exists()
        with Job(f"{_HERE}:saves", 1, folder, "plain", first.endpoint) as job:
            job.wait()
        check_run(folder)
        check_ended(first, signal.SIGINT)


def named_by_the_environment(folder: Path) -> None:
    """No saver is started, and an argument of attach goes before the environment."""
    env = {"ASYNC_CKPT_SAVER": f"ipc://{folder}/nobody.sock"}
    with Daemon(folder / "d", folder) as daemon:
        with Job(f"{_HERE}:saves", 2, folder / "a", "ddp", daemon.endpoint, env=env) as job:
            job.wait()
        with Job(f"{_HERE}:saves", 2, folder / "b", "ddp", "", env={"ASYNC_CKPT_SAVER": daemon.endpoint}) as job:
            job.wait()
        assert savers(folder) == [daemon.process.pid]
        assert daemon.log.read_text().count("checkpoint") or daemon.log.read_text().count("committed")
        check_run(folder / "a")
        check_run(folder / "b")


def restarted_between_saves(folder: Path) -> None:
    """Down while a save is staged, and up again: training never waits, and every save commits."""
    first = Daemon(folder / "d", folder).up()
    with Job(f"{_HERE}:saves", 2, folder, "fsdp2", first.endpoint, "before-2", "staged-2", "before-3") as job:
        job.reach("before-2")
        until(lambda: async_ckpt.latest(folder / "run") == folder / "run/checkpoint-1", "step 1 committed")
        check_ended(first)
        (folder / "go-2").touch()
        job.reach("staged-2")
        job.reach("before-3")
        assert async_ckpt.latest(folder / "run") == folder / "run/checkpoint-1"
        second = Daemon(folder / "d", folder).up()
        (folder / "go-3").touch()
        job.wait()
    until(lambda: not runs_of(folder), "closed runs are out of shared memory", 30.0)
    check_run(folder)
    check_ended(second)


def over_tcp(folder: Path) -> None:
    """A whole job, with keys on either side."""
    doors = Doors(folder)
    env = {SECRET_VARIABLE: str(folder / "client.key_secret"), SERVER_VARIABLE: str(doors.public)}
    with doors.start() as saver, Job(f"{_HERE}:saves", 2, folder, "fsdp2", doors.endpoint, env=env) as job:
        job.wait()
        assert "rejected" not in saver.said()
    check_run(folder)


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        two_runs_at_once,
        second_daemon_on_one_endpoint,
        named_by_the_environment,
        restarted_between_saves,
        over_tcp,
    )
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_daemon(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected}
        results.update(run_together(chosen, folder, at_once=4))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
