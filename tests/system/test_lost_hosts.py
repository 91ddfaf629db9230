"""Savers, ranks and whole hosts that are killed while bytes are on their way: what can be saved is, the rest is dropped
whole, and the training elsewhere goes on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import async_ckpt
from tests.system import hosts
from tests.system.faults import Faults, missing
from tests.system.hosts import SIDE, Cluster
from tests.system.processes import Job, Scenario, run_together, until
from tests.system.spread import HERE, all_reach, check, noted, tell
from tests.system.wire import Proxy

pytestmark = pytest.mark.skipif(bool(hosts.impossible()), reason=hosts.impossible() or "")

_LEASE = {"ASYNC_CKPT_LEASE_S": "10"}  # where it is to be over; a saver that is killed has to be back sooner
_PIECES_BYTES = 20_000  # less than what a rank of the tiny model hands over


@contextlib.contextmanager
def _wired(folder: Path) -> Iterator[tuple[Cluster, Proxy]]:
    with Cluster(folder, 2) as cluster:
        yield cluster, cluster.keep(Proxy(cluster))


def _job(cluster: Cluster, wire: Proxy, target: str, last: int, env: Mapping[str, str] | None = None) -> Job:
    each = {0: {"ASYNC_CKPT_LEAD": wire.lead_address}, 1: {"ASYNC_CKPT_LEAD": wire.address}}
    return cluster.job(f"{HERE}:{target}", [1, 1], "fsdp2", str(last), each=each, env=env)


def _committed(folder: Path, number: int) -> None:
    run = folder / "run"
    until(lambda: async_ckpt.latest(run) == run / f"checkpoint-{number}", f"step {number} committed")


def a_saver_is_killed(folder: Path, which: int, trials: int) -> None:
    """SIGKILL of the lead (0) or of the relay (1) while a piece is on its way, at another byte in each trial."""
    where = random.Random(which)
    killed = []
    with _wired(folder) as (cluster, wire), _job(cluster, wire, "saves", trials + 1) as job:
        all_reach(job, "settled-1")
        for number in range(2, trials + 2):
            _committed(folder, number - 1)
            wire.hold_after(where.randrange(_PIECES_BYTES))
            tell(folder, number)
            all_reach(job, f"saved-{number}")
            wire.until_held()
            assert not (folder / f"run/checkpoint-{number}").exists()
            killed.append(cluster.hosts[which].the_saver())
            os.kill(killed[-1], signal.SIGKILL)
            if which == 1:
                wire.until_lost()
            wire.let_go()
            all_reach(job, f"trained-{number}")
            _committed(folder, number)
        job.wait()
    assert len({*killed}) == trials
    assert noted(folder, 2) == [["committed"] * (trials + 1)] * 2
    check(folder, *range(1, trials + 2))


def both_savers_are_killed(folder: Path, trials: int) -> None:
    where = random.Random(2)
    with _wired(folder) as (cluster, wire), _job(cluster, wire, "saves", trials + 1) as job:
        all_reach(job, "settled-1")
        for number in range(2, trials + 2):
            _committed(folder, number - 1)
            wire.hold_after(where.randrange(_PIECES_BYTES))
            tell(folder, number)
            all_reach(job, f"saved-{number}")
            wire.until_held()
            for pid in [host.the_saver() for host in cluster.hosts]:
                os.kill(pid, signal.SIGKILL)
            wire.until_lost()
            wire.let_go()
            _committed(folder, number)
        job.wait()
    assert noted(folder, 2) == [["committed"] * (trials + 1)] * 2
    check(folder, *range(1, trials + 2))


def ranks_of_a_host_are_killed(folder: Path) -> None:
    """They had staged their part: their saver offers it, is asked for it, and hands it over without them."""
    with _wired(folder) as (cluster, wire), _job(cluster, wire, "saves_alone", 2) as job:
        _committed(folder, 1)
        wire.hold_after(0)
        tell(folder, 2)
        all_reach(job, "staged-2")
        wire.until_held()
        job.kill(1)
        until(lambda: "is gone" in cluster.hosts[1].log(), "the relay's notice of the death")
        assert not (folder / "run/checkpoint-2").exists()
        wire.let_go()
        until(lambda: job.statuses[0] is not None, "rank 0's end")
        assert job.statuses[0] == 0, job.printed()
    assert noted(folder, 1) == [["committed"] * 2]
    check(folder, 1, 2)


def a_host_is_lost(folder: Path, *, silently: bool) -> None:
    """In mid-transfer: that step is dropped and the one before it stands; what is left of the job hears of it and ends.
    `silently`: its link is cut first, so that no connection is closed and silence alone tells of it."""
    with _wired(folder) as (cluster, wire), _job(cluster, wire, "saves_alone", 3, _LEASE) as job:
        _committed(folder, 1)
        wire.hold_after(_PIECES_BYTES // 2)
        tell(folder, 2)
        all_reach(job, "staged-2")
        wire.until_held()
        if silently:
            cluster.cut(cluster.hosts[1], SIDE)
        cluster.hosts[1].lose()
        tell(folder, 3)
        until(lambda: job.statuses[0] is not None, "rank 0's end", 90.0)
        assert job.statuses[0] == 0, job.printed()
    ((first, second, third),) = noted(folder, 1)
    assert first == "committed"
    assert "rank 1" in second
    assert "rank 1" in third
    check(folder, 1)


def a_cut_for_good(folder: Path) -> None:
    """The training goes on; what was on its way is dropped on either side, and nothing hangs."""
    with Cluster(folder, 2) as cluster:
        variables = {"ASYNC_CKPT_LEAD": f"tcp://{cluster.hosts[0].address(SIDE)}:0", **_LEASE}
        with cluster.job(f"{HERE}:saves", [1, 1], "fsdp2", "3", env=variables) as job:
            all_reach(job, "settled-1")
            cluster.cut(cluster.hosts[1], SIDE)
            for number in (2, 3):
                tell(folder, number)
                all_reach(job, f"trained-{number}")
            job.wait(180)
    here, there = noted(folder, 2)
    assert here[0] == there[0] == "committed"
    assert all("rank 1" in reason for reason in here[1:]), here
    assert not {"committed", "staged"} & {*there[1:]}, there
    check(folder, 1)


def all_is_lost_but_the_leads_memory(folder: Path) -> None:
    """A step that all ranks have staged is committed, though every process is dead and the other host is gone."""
    faults = Faults(folder / "faults", folder / "run").build()
    with Cluster(folder, 2) as cluster:
        with cluster.job(f"{HERE}:saves_alone", [1, 1], "fsdp2", "2", each={0: faults.environment}) as job:
            _committed(folder, 1)
            faults.hold_sync(1)
            tell(folder, 2)
            all_reach(job, "staged-2")
            faults.until_held()  # the lead has all of it, and is about to make it durable
            os.kill(cluster.hosts[0].the_saver(), signal.SIGSTOP)  # before any rank sees that it is gone
            job.kill()
            os.kill(cluster.hosts[0].the_saver(), signal.SIGKILL)
            cluster.hosts[1].lose()
        assert async_ckpt.latest(folder / "run") == folder / "run/checkpoint-1"
        faults.none()
        with cluster.job(f"{HERE}:goes_on", [2], "fsdp2", "2") as job:
            job.wait()
    check(folder, 1, 2, 3)


_FAST: dict[str, Callable[[Path], None]] = {
    "the_lead_is_killed": lambda folder: a_saver_is_killed(folder, 0, 2),
    "the_relay_is_killed": lambda folder: a_saver_is_killed(folder, 1, 2),
    "ranks_of_a_host_are_killed": ranks_of_a_host_are_killed,
    "a_host_is_lost": lambda folder: a_host_is_lost(folder, silently=True),
    **({} if missing("cc") else {"all_is_lost_but_the_leads_memory": all_is_lost_but_the_leads_memory}),
}
_SLOW: dict[str, Callable[[Path], None]] = {
    "the_lead_is_killed_ten_times": lambda folder: a_saver_is_killed(folder, 0, 10),
    "the_relay_is_killed_ten_times": lambda folder: a_saver_is_killed(folder, 1, 10),
    "both_savers_are_killed_five_times": lambda folder: both_savers_are_killed(folder, 5),
    "a_host_falls": lambda folder: a_host_is_lost(folder, silently=False),
    "a_cut_for_good": a_cut_for_good,
}
SCENARIOS: dict[str, Scenario] = {**_FAST, **_SLOW}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", [*_FAST, *(pytest.param(name, marks=pytest.mark.full) for name in _SLOW)])
def test_lost_hosts(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected}
        results.update(run_together(chosen, folder, at_once=6))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
