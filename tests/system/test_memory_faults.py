"""Memory that runs out or is taken away: shared memory, the saver's own, its temporary files.

Training goes on, everybody hears what happened and what to do, and the next save works once the fault is gone.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.system import faults
from tests.system.endurance import LIMIT_S, Training, by_rank_0, fault
from tests.system.faults import Namespace, memory_limit, missing
from tests.system.processes import Daemon, Job, Scenario, run_together, savers, the_saver, until
from tests.system.rank_process import NAMESPACE_VARIABLE
from tests.system.training import attach, everywhere, reached, refusal, wrapped

_HERE = "tests.system.test_memory_faults"


def shared_memory_fills_up(folder: str) -> None:
    """The image's space is reserved; what is not is the record of a save, as large as its documents."""
    shm = Path("/dev/shm")
    training = Training(Path(folder, "run"))
    training.good(1)
    large = {"note": "x" * 200_000}
    with fault(lambda: faults.fill(shm), lambda: faults.make_room(shm)):
        training.fails(training.start(2, extra=large), "/dev/shm is full: 0 bytes available", "--shm-size")
        training.fails(training.start(3, extra=large), "/dev/shm is full: 0 bytes available", "--shm-size")
        assert not list(shm.glob("async-ckpt-*/*/*.tmp"))
    training.lands(training.start(4, extra=large))
    with fault(lambda: faults.fill(shm), lambda: faults.make_room(shm)):
        said = refusal(lambda: attach(training.model, directory=Path(folder, "other"), timeout_s=LIMIT_S))
        assert "/dev/shm has 0 bytes available, but 2 slots of this model need" in said
        assert len(list(shm.glob("async-ckpt-*/*"))) == 1
    training.good(5)
    training.end()


def slots_are_removed(folder: str) -> None:
    """As systemd does when a user logs out: no save can work any more, each says so, and a new attach works."""
    training = Training(Path(folder, "run"))
    training.good(1)
    by_rank_0(lambda: shutil.rmtree(next(Path("/dev/shm").glob("async-ckpt-*"))))
    for number in (2, 3):
        training.bad(number, "somebody removed .* from shared memory", "RemoveIPC=no", "attach again")
    training.ckpt.close()
    again = Training(Path(folder, "run"))
    again.good(4)
    again.ckpt.close()


def temporary_files_cannot_be_made(folder: str) -> None:
    disk = Path(folder, "tmp")
    by_rank_0(lambda: faults.small_disk(disk))
    os.environ["TMPDIR"] = tempfile.tempdir = str(disk)
    model = wrapped("fsdp2")
    with fault(lambda: faults.remount(disk, "ro"), lambda: faults.remount(disk, "rw")):
        said = refusal(lambda: attach(model, directory=Path(folder, "run"), timeout_s=LIMIT_S))
        assert re.search(r"/tmp/async-ckpt-0 cannot be made: Read-only file system", said), said
    training = Training(Path(folder, "run"))
    training.good(1)
    training.end()


def in_small_shared_memory(folder: Path, target: str) -> None:
    folder.mkdir(parents=True)
    with Namespace() as namespace:
        subprocess.run([*namespace.wrapper, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/dev/shm"], check=True)
        with Job(f"{_HERE}:{target}", 2, folder, env={NAMESPACE_VARIABLE: namespace.path}) as job:
            job.wait()
        until(lambda: not savers(folder), "the saver has ended", 30.0)
        assert list(namespace.seen("/dev/shm").iterdir()) == []


def saver_is_killed_for_memory(folder: str, endpoint: str = "") -> None:
    training = Training(Path(folder, "run"), saver=endpoint or None)
    training.good(1)
    dist.barrier()
    reached(folder, "saved")
    until(Path(folder, "caught").exists, "the saver is in the cgroup")
    handle = training.start(2)  # the kernel kills the saver when it takes this up
    training.lands(handle)
    training.good(3)
    if not endpoint:
        assert any("the embedded saver is gone" in line and "dmesg" in line for line in everywhere(training.log)[0]
                   + everywhere(training.log)[1])  # fmt: skip
    training.end()


def out_of_memory(folder: Path, *, daemon: bool) -> None:
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        limit = stack.enter_context(memory_limit())
        first = stack.enter_context(Daemon(folder / "d", folder)) if daemon else None
        arguments = [first.endpoint] if first is not None else []
        job = stack.enter_context(Job(f"{_HERE}:saver_is_killed_for_memory", 2, folder, *arguments))
        job.reach("saved")
        pid = the_saver(folder)
        limit.catch(pid)
        (folder / "caught").touch()
        if first is not None:
            assert first.process.wait(60) == -signal.SIGKILL
            stack.enter_context(Daemon(folder / "d", folder))
        job.wait()
        assert limit.kills == 1
        assert pid not in savers(folder)
        until(lambda: daemon or not savers(folder), "the saver has ended", 30.0)


SCENARIOS: dict[str, Scenario] = {
    "shared_memory_fills_up": lambda folder: in_small_shared_memory(folder, "shared_memory_fills_up"),
    "slots_are_removed": lambda folder: in_small_shared_memory(folder, "slots_are_removed"),
    "temporary_files_cannot_be_made": lambda folder: in_small_shared_memory(folder, "temporary_files_cannot_be_made"),
    "out_of_memory-embedded": lambda folder: out_of_memory(folder, daemon=False),
    "out_of_memory-daemon": lambda folder: out_of_memory(folder, daemon=True),
}
NEEDS = {name: ("cgroup",) if name.startswith("out_of_memory") else ("root",) for name in SCENARIOS}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_memory_faults(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if reason := missing(*NEEDS[scenario]):
        pytest.skip(reason)
    if not results:
        chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected and not missing(*NEEDS[name])}
        results.update(run_together(chosen, folder, at_once=5))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
