"""Disks, memory, clocks and processes that fail under a job: training goes on, everybody hears what happened and what
to do, nothing partial is left, and the next save works once the fault is gone.

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
            # The handle ends before the line is written.
            until(lambda fact=fact: any(re.search(fact, line) for line in self.log), f"{fact!r} in {self.log}", 10.0)
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
    kept_by_policy = ["checkpoint-10", "checkpoint-9", "latest"]
    by_rank_0(lambda: until(lambda: sorted(os.listdir(folder / "run")) == kept_by_policy, "retention"))
    by_rank_0(lambda: steer.set_clock(0))
    training.end()


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


# --- shared memory, and the saver's own files ----------------------------------------------------------------------


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
        said = refusal(lambda: attach(training.model, directory=Path(folder, "other"), timeout_s=_LIMIT_S))
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
        said = refusal(lambda: attach(model, directory=Path(folder, "run"), timeout_s=_LIMIT_S))
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


# --- the saver's process -------------------------------------------------------------------------------------------


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


# --- a rank --------------------------------------------------------------------------------------------------------


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
    assert "not saved" in refusal(lambda: late.wait(_LIMIT_S))
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
    assert staged.wait(_LIMIT_S) == training.directory / "checkpoint-2"
    for handle in handles:
        said = refusal(lambda handle=handle: handle.wait(_LIMIT_S))
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
    "shared_memory_fills_up": lambda folder: in_small_shared_memory(folder, "shared_memory_fills_up"),
    "slots_are_removed": lambda folder: in_small_shared_memory(folder, "slots_are_removed"),
    "temporary_files_cannot_be_made": lambda folder: in_small_shared_memory(folder, "temporary_files_cannot_be_made"),
    "out_of_memory-embedded": lambda folder: out_of_memory(folder, daemon=False),
    "out_of_memory-daemon": lambda folder: out_of_memory(folder, daemon=True),
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
NEEDS |= {
    "shared_memory_fills_up": ("root",),
    "slots_are_removed": ("root",),
    "temporary_files_cannot_be_made": ("root",),
    "out_of_memory": ("cgroup",),
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


def needs_of(scenario: str) -> tuple[str, ...]:
    return NEEDS.get(scenario.removesuffix("-embedded").removesuffix("-daemon"), ())


def scenarios_of(selected: set[str]) -> dict[str, Scenario]:
    """The longest first."""
    chosen: dict[str, Scenario] = {}
    for kind in ("embedded", "daemon"):
        names = [name for name in CASES if f"{name}-{kind}" in selected and not missing(*needs_of(name))]
        if names:
            chosen[kind] = lambda folder, names=names, kind=kind: storage(folder, names, daemon=kind == "daemon")
    return chosen | {name: SCENARIOS[name] for name in SCENARIOS if name in selected and not missing(*needs_of(name))}


# What differs little from another one.
_FULL = {"any_sync_fails-daemon", "directory_is_removed-daemon", "wall_clock_jumps-embedded", "device_fails-daemon",
         "device_takes_no_more-daemon", "raising_rank-0-without", "raising_rank-1-with"}  # fmt: skip


def parameters() -> list[Any]:
    names = [*(f"{name}-{kind}" for name in CASES for kind in ("embedded", "daemon")), *SCENARIOS]
    assert set(names) > _FULL
    return [pytest.param(name, marks=pytest.mark.full if name in _FULL else ()) for name in names]


@pytest.mark.parametrize("scenario", parameters())
def test_faults(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if reason := missing(*needs_of(scenario)):
        pytest.skip(reason)
    if not results:
        results.update(run_together(scenarios_of(selected), folder, at_once=5))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
