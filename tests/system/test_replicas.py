"""A host is lost for good, and the job comes back on the others from RAM: storage is asked for a manifest, no more."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import async_ckpt
from async_ckpt.core.manifest import MANIFEST_NAME
from tests.system import hosts
from tests.system.hosts import Cluster, Host
from tests.system.processes import Job, Scenario, run_together, until
from tests.system.spread import HERE, check, noted

pytestmark = pytest.mark.skipif(bool(hosts.impossible()), reason=hosts.impossible() or "")


def copies(host: Host) -> list[Path]:
    """The copies that are whole on `host`."""
    folder = host.seen(f"/dev/shm/async-ckpt-{os.getuid()}")
    return [path.parent for path in folder.glob("copy-*/copy.msgpack")]


def copied(host: Host, folder: Path, number: int) -> None:
    """Until `host` has checkpoint `number` in RAM, byte for byte."""
    until(lambda: _same(host, folder / f"run/checkpoint-{number}"), f"a copy of step {number} on {host.name}")


def _same(host: Host, checkpoint: Path) -> bool:
    try:
        (copy,) = copies(host)
        files = {path.relative_to(checkpoint): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
        there = copy / "checkpoint"
        return files == {path.relative_to(there): path.read_bytes() for path in there.rglob("*") if path.is_file()}
    except (OSError, ValueError):
        return False


def hide(folder: Path, number: int) -> Callable[[], None]:
    """Of checkpoint `number` nothing is left on storage but its manifest, until what this returns is called."""
    checkpoint, away = folder / f"run/checkpoint-{number}", folder / "away"
    checkpoint.rename(away)
    checkpoint.mkdir()
    (checkpoint / MANIFEST_NAME).write_bytes((away / MANIFEST_NAME).read_bytes())

    def unhide() -> None:
        (checkpoint / MANIFEST_NAME).unlink()
        checkpoint.rmdir()
        away.rename(checkpoint)

    return unhide


def blind(folder: Path, host: Host) -> None:
    """`host` does not see the directory at all."""
    host.run("mount", "-t", "tmpfs", "none", str(folder / "run"))


def _saved(cluster: Cluster, folder: Path) -> Job:
    """A job on three hosts whose second save is committed and copied; it lives."""
    job = cluster.job(f"{HERE}:saves_and_waits", [1, 1, 1], "fsdp2", "2", env={"ASYNC_CKPT_LEASE_S": "10"})
    run = folder / "run"
    until(lambda: async_ckpt.latest(run) == run / "checkpoint-2" or any(job.statuses), "step 2 committed", 120.0)
    assert not any(job.statuses), job.printed()
    copied(cluster.hosts[1], folder, 2)
    assert [len(copies(host)) for host in cluster.hosts] == [0, 1, 0]
    return job


def _comes_back(cluster: Cluster, folder: Path, living: list[int]) -> None:
    """The job on these hosts, the first of them its lead."""
    ranks = [1] * len(living)
    unhide = hide(folder, 2)
    for place in living[1:]:
        blind(folder, cluster.hosts[place])
    with cluster.job(f"{HERE}:restores", ranks, "fsdp2", "2", on=living) as job:
        job.wait()
    assert noted(folder, len(living)) == [["ram", "committed"]] * len(living)
    unhide()
    check(folder, 1, 2, 3)


def a_host_is_lost(folder: Path, lost: int, order: list[int]) -> None:
    """Its memory and all its processes; the ranks of the others are killed as their launcher would do."""
    with Cluster(folder, 3) as cluster:
        job = _saved(cluster, folder)
        cluster.hosts[lost].lose()
        job.kill()
        _comes_back(cluster, folder, order)


def all_ranks_die(folder: Path) -> None:
    """No host is lost."""
    with Cluster(folder, 3) as cluster:
        _saved(cluster, folder).kill()
        _comes_back(cluster, folder, [0, 1, 2])


_FAST: dict[str, Callable[[Path], None]] = {
    "the_lead_host_is_lost": lambda folder: a_host_is_lost(folder, 0, [1, 2]),
    "the_new_lead_has_no_copy": lambda folder: a_host_is_lost(folder, 0, [2, 1]),
}
_SLOW: dict[str, Callable[[Path], None]] = {
    "the_host_with_the_copy_is_lost": lambda folder: a_host_is_lost(folder, 1, [0, 2]),
    "all_ranks_die": all_ranks_die,
}
SCENARIOS: dict[str, Scenario] = {**_FAST, **_SLOW}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", [*_FAST, *(pytest.param(name, marks=pytest.mark.full) for name in _SLOW)])
def test_replicas(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected}
        results.update(run_together(chosen, folder, at_once=2))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
