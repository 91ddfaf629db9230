"""Places that cannot be used are refused on every rank, with what to do; nothing is left, and training goes on."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.system.processes import Daemon, Job, Scenario, environment, run_together, until
from tests.system.training import attach, check_checkpoint, rank, reached, reference, refused, wrapped

_HERE = "tests.system.test_refused_places"


def holds_the_directory(folder: str) -> None:
    model = wrapped("fsdp2")
    expected = reference()
    with attach(model, directory=Path(folder, "run"), timeout_s=60) as ckpt:
        dist.barrier()
        reached(folder, "attached")
        until(Path(folder, "refused").exists, "the other job's refusal", 90)
        path = ckpt.save(1).wait()
    if rank() == 0:
        check_checkpoint(path, expected, 1)


def wants_the_same_directory(folder: str, pids: str) -> None:
    refused(Path(folder, "run"), rf"{folder}/run is in use by another job", re.escape(pids), "choose another directory")


def two_jobs_in_one_directory(folder: Path) -> None:
    with Job(f"{_HERE}:holds_the_directory", 2, folder) as first:
        first.reach("attached")
        with Job(f"{_HERE}:wants_the_same_directory", 2, folder, str(first.pids)) as second:
            second.wait()
        (folder / "refused").touch()
        first.wait()


def is_refused(folder: str, endpoint: str, directory: str, *facts: str) -> None:
    refused(Path(directory), *facts, saver=endpoint)


def _in_mount_namespace(*mounts: str) -> list[str]:
    return ["unshare", "--mount", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]


def outside_the_root(folder: Path) -> None:
    directory = str(folder / "elsewhere")
    with Daemon(folder / "d", folder / "root") as daemon:
        facts = (rf"{directory} is outside the root {folder}/root", "--root")
        for each in (directory, str(folder / "root/../elsewhere")):
            with Job(f"{_HERE}:is_refused", 2, folder, daemon.endpoint, each, *facts) as job:
                job.wait()


def shared_memory_is_too_small(folder: Path) -> None:
    """The daemon alone is told of a small /dev/shm."""
    (folder / "site").mkdir(parents=True)
    (folder / "site/sitecustomize.py").write_text(
        "import os, types\nos.statvfs = lambda path: types.SimpleNamespace(f_bavail=4, f_frsize=4096)\n"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(folder / "site"), environment()["PYTHONPATH"]])}
    facts = (r"/dev/shm has 16384 bytes available", r"2 slots of this model need \d{5,}", "--shm-size", "remount,size=",
             "fewer slots")  # fmt: skip
    with Daemon(folder / "d", folder, env=env) as daemon:
        for _ in range(2):  # nothing of the first refusal takes up room at the second
            with Job(f"{_HERE}:is_refused", 2, folder, daemon.endpoint, str(folder / "run"), *facts) as job:
                job.wait()


def shared_memory_of_another_container(folder: Path) -> None:
    """The saver sees a /dev/shm of its own, so it could never hand over a slot."""
    if os.geteuid() != 0:
        return
    wrapper = _in_mount_namespace("mount -t tmpfs -o size=16m none /dev/shm")
    facts = (r"rank \d does not see the /dev/shm of the saver", "--ipc=container", "emptyDir")
    with (
        Daemon(folder / "d", folder, wrapper=wrapper) as daemon,
        Job(f"{_HERE}:is_refused", 2, folder, daemon.endpoint, str(folder / "run"), *facts) as job,
    ):
        job.wait()
    assert "rejected (foreign_host, number 2)" in daemon.log.read_text()


def directory_is_read_only(folder: Path) -> None:
    root = folder / "root"
    root.mkdir(parents=True)
    wrapper = _in_mount_namespace(f"mount --bind {root} {root}", f"mount -o remount,bind,ro {root}")
    if os.geteuid() != 0:
        root.chmod(0o500)
        wrapper = []
    facts = (rf"cannot write to {root}/run", r"Read-only file system|Permission denied", r"writable for uid \d+")
    with (
        Daemon(folder / "d", root, wrapper=wrapper) as daemon,
        Job(f"{_HERE}:is_refused", 2, folder, daemon.endpoint, str(root / "run"), *facts) as job,
    ):
        job.wait()


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        two_jobs_in_one_directory,
        outside_the_root,
        shared_memory_is_too_small,
        shared_memory_of_another_container,
        directory_is_read_only,
    )
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_refused_places(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected}
        results.update(run_together(chosen, folder, at_once=3))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
