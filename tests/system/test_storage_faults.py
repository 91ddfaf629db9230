"""Disks and clocks that fail under a job: training goes on, everybody hears what happened and what to do, nothing
partial is left, and the next save works once the fault is gone.

What happens to storage happens to the saver, so each of `CASES` runs with the embedded saver and with a daemon. In a
case the ranks make the fault themselves, in a mount namespace that they share with their saver.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system import faults
from tests.system.endurance import LIMIT_S, Training, by_rank_0, fault
from tests.system.faults import Faults, Namespace, missing
from tests.system.processes import Daemon, Scenario, run_cases, run_together, savers, until
from tests.system.rank_process import NAMESPACE_VARIABLE
from tests.system.training import everywhere

_HERE = "tests.system.test_storage_faults"


def the_faults() -> Faults:
    """Those of the saver of this job."""
    return Faults(Path(os.environ["FAULTS"]), Path(os.environ["FAULTS_BELOW"]))


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
            everywhere(handle.wait(LIMIT_S))
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


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


# What differs little from another one.
_FULL = {"any_sync_fails-daemon", "directory_is_removed-daemon", "wall_clock_jumps-embedded", "device_fails-daemon",
         "device_takes_no_more-daemon"}  # fmt: skip


def parameters() -> list[Any]:
    names = [f"{name}-{kind}" for name in CASES for kind in ("embedded", "daemon")]
    assert set(names) > _FULL
    return [pytest.param(name, marks=pytest.mark.full if name in _FULL else ()) for name in names]


def scenarios_of(selected: set[str]) -> dict[str, Scenario]:
    chosen: dict[str, Scenario] = {}
    for kind in ("embedded", "daemon"):
        names = [name for name in CASES if f"{name}-{kind}" in selected and not missing(*NEEDS[name])]
        if names:
            chosen[kind] = lambda folder, names=names, kind=kind: storage(folder, names, daemon=kind == "daemon")
    return chosen


@pytest.mark.parametrize("scenario", parameters())
def test_storage_faults(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if reason := missing(*NEEDS[scenario.rpartition("-")[0]]):
        pytest.skip(reason)
    if not results:
        results.update(run_together(scenarios_of(selected), folder, at_once=2))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
