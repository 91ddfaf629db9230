"""Disks, memory, clocks and processes that fail under a job: training goes on, everybody hears what happened and what to
do, nothing partial is left, and the next save works once the fault is gone.

What happens to storage happens to the saver, so each of `CASES` runs with the embedded saver and with a daemon. In a
case the ranks make the fault themselves, in a mount namespace that they share with their saver.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import async_ckpt
from tests.system import faults
from tests.system.faults import Faults, Namespace, memory_limit, missing
from tests.system.processes import (
    NAMESPACE_VARIABLE,
    Daemon,
    Job,
    Scenario,
    run_cases,
    run_together,
    savers,
    the_saver,
    until,
)
from tests.system.training import (
    adamw,
    attach,
    check_checkpoint,
    everywhere,
    full_values,
    keep,
    kept,
    rank,
    reached,
    reference,
    refusal,
    step,
    wrapped,
)

_HERE = "tests.system.test_faults"
_LIMIT_S = 60.0


class Training:
    """A model that trains on, whatever becomes of its checkpoints, and what each of those must hold."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory = directory
        self.model = wrapped("fsdp2")
        self.optimizer = adamw(self.model)
        self.steps = 0
        self.committed: list[int] = []
        self.failed = 0
        self.log: list[str] = []
        self._handler = _Collecting(self.log)
        logging.getLogger("async_ckpt").addHandler(self._handler)
        self.ckpt = attach(self.model, self.optimizer, directory=directory, **{"timeout_s": _LIMIT_S, **options})

    def train(self) -> None:
        step(self.model, self.optimizer)
        self.steps += 1

    def start(self, number: int, **save: Any) -> async_ckpt.SaveHandle:
        """Train, save, train on."""
        self.train()
        self.expected = reference(values=full_values(self.model))
        handle = self.ckpt.save(number, **save)
        self.train()
        return handle

    def good(self, number: int) -> None:
        """A save that must come out right."""
        self.lands(self.start(number))

    def lands(self, handle: async_ckpt.SaveHandle) -> None:
        path = handle.wait(_LIMIT_S)
        self.committed.append(handle.step)
        assert path == self.directory / f"checkpoint-{handle.step}"
        if rank() == 0:
            check_checkpoint(path, self.expected, handle.step)
            assert async_ckpt.latest(self.directory) == path
        dist.barrier()

    def bad(self, number: int, *facts: str) -> str:
        """A save that must fail on every rank, for a reason with all `facts` (patterns) in the handle and the log."""
        return self.fails(self.start(number), *facts)

    def fails(self, handle: async_ckpt.SaveHandle, *facts: str) -> str:
        message = refusal(lambda: handle.wait(_LIMIT_S))
        self.failed += 1
        assert handle.state == "failed"
        for fact in (rf"step {handle.step}\b", *facts):
            assert re.search(fact, message), f"{fact!r} is not in {message!r}"
            assert any(re.search(fact, line) for line in self.log), f"{fact!r} is not in {self.log}"
        self.train()
        dist.barrier()
        return message

    def end(self) -> None:
        """Everything is counted, the newest checkpoint loads, and there is nothing but whole checkpoints."""
        resumed = self.ckpt.restore()
        assert resumed is not None
        assert resumed.step == self.committed[-1]
        self.ckpt.close()
        logging.getLogger("async_ckpt").removeHandler(self._handler)
        stats = self.ckpt.stats()
        counted = {name: stats[name] for name in ("saves", "committed", "failed")}
        committed = len(self.committed)
        assert counted == {"saves": committed + self.failed, "committed": committed, "failed": self.failed}
        assert self.steps >= 2 * counted["saves"]
        dist.barrier()
        self.check_directory()

    def check_directory(self) -> None:
        if rank() == 0:
            found = sorted(os.listdir(self.directory))
            there = [number for number in self.committed if f"checkpoint-{number}" in found]
            assert found == sorted([*(f"checkpoint-{number}" for number in there), "latest"])
            assert os.readlink(self.directory / "latest") == f"checkpoint-{self.committed[-1]}"
        dist.barrier()


class _Collecting(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def by_rank_0(action: Callable[[], object]) -> None:
    """Everybody goes on when it is done."""
    dist.barrier()
    if rank() == 0:
        action()
    dist.barrier()


@contextmanager
def fault(begin: Callable[[], object], end: Callable[[], object]) -> Iterator[None]:
    by_rank_0(begin)
    yield
    by_rank_0(end)


def the_faults() -> Faults:
    """Those of the saver of this job."""
    return Faults(Path(os.environ["FAULTS"]), Path(os.environ["FAULTS_BELOW"]))


# --- storage -------------------------------------------------------------------------------------------------------


def disk_is_full(folder: Path) -> None:
    disk = folder / "disk"
    by_rank_0(lambda: faults.small_disk(disk))
    training = Training(disk / "run")
    training.good(1)
    for number, leave_bytes in ((2, 0), (3, 2 * 4096), (4, 4 * 4096)):  # before the first byte, and after some files
        with fault(lambda leave_bytes=leave_bytes: faults.fill(disk, leave_bytes), lambda: faults.make_room(disk)):
            training.bad(number, "No space left on device", "free some space", "keep_last", "the next save tries again")
            training.check_directory()
    training.good(5)
    training.end()


def disk_is_read_only(folder: Path) -> None:
    disk = folder / "disk"
    by_rank_0(lambda: faults.small_disk(disk))
    training = Training(disk / "run")
    training.good(1)
    with fault(lambda: faults.remount(disk, "ro"), lambda: faults.remount(disk, "rw")):
        training.bad(2, "Read-only file system", "remount,rw")
    training.good(3)
    training.end()


def device_fails(folder: Path) -> None:
    """EIO from everything, until the filesystem is mounted anew."""
    disk, image = folder / "disk", folder / "image"
    by_rank_0(lambda: faults.loop_disk(image, disk))
    training = Training(disk / "run")
    training.good(1)

    def mount_anew() -> None:
        faults.unmount(disk)
        faults.mount(disk, "-o", "loop", str(image))

    with fault(lambda: faults.shut_down(disk), mount_anew):
        training.bad(2, "Input/output error", "dmesg")
    training.good(3)
    training.end()


def device_takes_no_more(folder: Path) -> None:
    """A device that is thinly provisioned, and full: writes go through, and only the sync says that they are lost."""
    pool, disk = folder / "pool", folder / "disk"
    by_rank_0(lambda: faults.small_disk(pool))
    by_rank_0(lambda: faults.loop_disk(pool / "image", disk, "ext2"))
    training = Training(disk / "run")
    training.good(1)
    with fault(lambda: faults.fill(pool), lambda: faults.make_room(pool)):
        training.bad(2, "Input/output error|No space left on device")
    training.good(3)
    training.end()


def any_sync_fails(folder: Path) -> None:
    """Each sync of a commit in turn. No path is synced again after it: every save writes its own files."""
    steer = the_faults()
    training = Training(folder / "run")
    before = len(steer.syncs())
    training.good(1)
    one_commit = [Path(path).relative_to(folder / "run") for path in steer.syncs()[before:]]
    names = [re.sub(r"^\.checkpoint-1\.\w+\.tmp", "tmp", str(path)) for path in one_commit]
    assert names[-4:] == ["tmp/training_state", "tmp", ".", "."]  # the parent after the rename, and after `latest`
    assert names[-5] == "tmp/async_ckpt.json"
    assert len(names) >= 10
    number = 1
    for position in range(1, len(names) + 1):
        number += 1
        seen = len(steer.syncs())
        by_rank_0(lambda position=position: steer.fail_sync(position, errno.EIO))
        if position < len(names):
            training.bad(number, "Input/output error", "dmesg")
            assert not (folder / "run" / f"checkpoint-{number}").exists()
        else:  # only `latest` is not durable: the checkpoint is
            training.good(number)
            assert any("`latest` could not be moved" in line for line in training.log)
        by_rank_0(steer.none)
        failed = steer.syncs()[seen:][position - 1]
        training.check_directory()
        number += 1
        training.good(number)
        assert Path(failed).name == "run" or steer.syncs().count(failed) == 1
    print(f"{len(names)} syncs a commit, each failed once: {training.failed} failed saves, "
          f"{len(training.committed)} committed", flush=True)  # fmt: skip
    training.end()


def directory_is_removed(folder: Path) -> None:
    """Between saves, and at every sync of a commit."""
    steer = the_faults()
    run = folder / "run"
    training = Training(run)
    before = len(steer.syncs())
    training.good(1)
    count = len(steer.syncs()) - before
    by_rank_0(lambda: shutil.rmtree(run))
    training.good(2)
    number = 2
    for position in range(1, count + 1):
        number += 1
        by_rank_0(lambda position=position: steer.hold_sync(position))
        handle = training.start(number)
        by_rank_0(steer.until_held)
        by_rank_0(lambda: shutil.rmtree(run))
        by_rank_0(steer.none)
        if position < count - 1:
            training.fails(handle, "No such file or directory")
        else:  # it had its name already
            everywhere(handle.wait(_LIMIT_S))
            training.committed.append(number)
        number += 1
        training.good(number)
        training.check_directory()
    training.end()


def directory_is_a_file(folder: Path) -> None:
    run = folder / "run"
    training = Training(run)
    training.good(1)

    def replace() -> None:
        shutil.rmtree(run)
        run.write_text("in the way")

    with fault(replace, run.unlink):
        training.bad(2, "File exists|Not a directory", str(run))
    training.good(3)
    training.end()


def wall_clock_jumps(folder: Path) -> None:
    """The saver's, by ten years to and fro, between saves and within a commit: no save, removal or lease notices."""
    steer = the_faults()
    training = Training(folder / "run", keep_last=2)
    number = 0
    for offset_s in (315_000_000, -315_000_000, 0, -1_000, 1_000):
        number += 1
        by_rank_0(lambda offset_s=offset_s: steer.set_clock(offset_s))
        training.good(number)
        number += 1
        by_rank_0(lambda: steer.hold_sync(2))
        handle = training.start(number)
        by_rank_0(steer.until_held)
        by_rank_0(lambda offset_s=offset_s: steer.set_clock(-offset_s))
        by_rank_0(steer.none)
        training.lands(handle)
    by_rank_0(lambda: until(lambda: len(list((folder / "run").glob("checkpoint-*"))) == 2, "retention"))
    by_rank_0(lambda: steer.set_clock(0))
    training.end()
    if rank() == 0:
        assert sorted(path.name for path in (folder / "run").glob("c*")) == ["checkpoint-10", "checkpoint-9"]


NEEDS: dict[str, tuple[str, ...]] = {
    "disk_is_full": ("root",),
    "disk_is_read_only": ("root",),
    "device_fails": ("loop",),
    "device_takes_no_more": ("loop",),
    "any_sync_fails": ("cc",),
    "directory_is_removed": ("cc",),
    "directory_is_a_file": (),
    "wall_clock_jumps": ("cc",),
}
CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case
    for case in (
        disk_is_full,
        disk_is_read_only,
        device_fails,
        device_takes_no_more,
        any_sync_fails,
        directory_is_removed,
        directory_is_a_file,
        wall_clock_jumps,
    )
}


@contextmanager
def surroundings(folder: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The environment of ranks, and what goes before the command of a daemon: a mount namespace, a fault library."""
    with ExitStack() as stack:
        environment: dict[str, str] = {}
        wrapper: list[str] = []
        if not missing("root"):
            namespace = stack.enter_context(Namespace())
            environment[NAMESPACE_VARIABLE] = namespace.path
            wrapper = namespace.wrapper
        if not missing("cc"):
            environment |= Faults(folder / "faults", folder).build().environment
        yield environment, wrapper


def storage(folder: Path, names: list[str], *, daemon: bool) -> Mapping[str, str]:
    folder.mkdir(parents=True)
    kind = "daemon" if daemon else "embedded"
    with surroundings(folder) as (environment, wrapper), ExitStack() as stack:
        if daemon:
            saver = stack.enter_context(Daemon(folder / "d", folder, wrapper=wrapper, env=environment))
            environment["ASYNC_CKPT_SAVER"] = saver.endpoint
        results = run_cases(_HERE, names, 2, folder, env=environment)
        if not daemon:
            until(lambda: not savers(folder), "the embedded savers have ended", 30.0)
    return {f"{name}-{kind}": failure for name, failure in results.items()}


SCENARIOS: dict[str, Scenario] = {}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


def scenarios_of(selected: set[str]) -> dict[str, Scenario]:
    chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected and not missing(*NEEDS.get(name, ()))}
    for kind in ("embedded", "daemon"):
        names = [name for name in CASES if f"{name}-{kind}" in selected and not missing(*NEEDS[name])]
        if names:
            chosen[kind] = lambda folder, names=names, kind=kind: storage(folder, names, daemon=kind == "daemon")
    return chosen


@pytest.mark.parametrize("scenario", [*(f"{name}-{kind}" for name in CASES for kind in ("embedded", "daemon")), *SCENARIOS])
def test_faults(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if reason := missing(*NEEDS.get(scenario.removesuffix("-embedded").removesuffix("-daemon"), ())):
        pytest.skip(reason)
    if not results:
        results.update(run_together(scenarios_of(selected), folder, at_once=5))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
