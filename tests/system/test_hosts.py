"""Jobs on several hosts: one checkpoint, byte for byte what one process would have saved."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from async_ckpt.core.keys import generate
from async_ckpt.core.manifest import FORMAT, FORMAT_IN_PIECES, read_manifest
from tests.system import hosts
from tests.system.hosts import SIDE, Cluster
from tests.system.processes import Scenario, run_together
from tests.system.spread import HERE, all_reach, check, noted, state_of, tell
from tests.system.wire import Proxy

pytestmark = pytest.mark.skipif(bool(hosts.impossible()), reason=hosts.impossible() or "")

_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--rdzv-backend=c10d",
             "--rdzv-endpoint=host-1:29500", "--rdzv-id=job"]  # fmt: skip


def _run_torchrun(folder: Path, *job: str, restarts: int = 0) -> None:
    with Cluster(folder, 2) as cluster:
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if restarts else {}
        _torchrun(cluster, variables, *job, restarts=restarts)


def _torchrun(cluster: Cluster, variables: Mapping[str, str], *job: str, restarts: int = 0) -> None:
    """Real torchrun on two hosts, as a user starts it; the lead is found by torch's store, with keys of this attach."""
    folder = cluster.folder
    script = [str(Path(__file__).with_name("spread_job.py")), str(folder), *job]
    command = [*_TORCHRUN, f"--nnodes={len(cluster.hosts)}", f"--max-restarts={restarts}", *script]
    logs = [(folder / f"torchrun-{host.number}").open("wb") for host in cluster.hosts]
    agents = [
        host.popen(command, variables, stdout=log, stderr=log) for host, log in zip(cluster.hosts, logs, strict=True)
    ]
    statuses = [agent.wait(120) for agent in agents]
    for log in logs:
        log.close()
    assert statuses == [0, 0], "\n".join(Path(log.name).read_text()[-4000:] for log in logs) + cluster.logs()


def by_torchrun(folder: Path) -> None:
    _run_torchrun(folder, "saves", "fsdp2", "2")
    assert noted(folder, 2) == [["committed", "committed"]] * 2
    check(folder, 1, 2)


def each_host_writes_its_part(folder: Path) -> None:
    """--shared-fs direct, for savers that attach starts by their environment: the same bytes, which nobody hands over.
    No image is whole, so what is still in a slot is restored from the directory; the next job goes on from there, and
    has the lead write all."""
    with Cluster(folder, 2) as cluster:
        _torchrun(cluster, {"ASYNC_CKPT_SHARED_FS": "direct"}, "saves_and_goes_back", "fsdp2")
        said = [host.log() for host in cluster.hosts]
        with cluster.job(f"{HERE}:goes_on", [1, 1], "fsdp2", "2") as job:
            job.wait()
    assert noted(folder, 2) == [["disk", "committed"]] * 2
    assert [text.count("the part of this host is written") for text in said] == [0, 2]
    formats = [read_manifest(folder / f"run/checkpoint-{number}").format for number in (1, 2, 3)]
    assert formats == [FORMAT_IN_PIECES, FORMAT_IN_PIECES, FORMAT]
    check(folder, 1, 2, 3)


def restarted_by_torchrun(folder: Path) -> None:
    """Its agents count restarts each for itself: the one whose rank did not die counts none."""
    _run_torchrun(folder, "dies_and_goes_on", "fsdp2", restarts=1)
    assert noted(folder, 2) == [["1", "committed"]] * 2
    check(folder, 1, 2)


def three_hosts_with_one_tmpdir(folder: Path) -> None:
    """FSDP1 on hosts with 1, 2 and 1 ranks, whose TMPDIR is the same directory of a shared filesystem."""
    with Cluster(folder, 3, shared_tmp=True) as cluster, cluster.job(f"{HERE}:saves", [1, 2, 1], "fsdp1", "2") as job:
        all_reach(job, "settled-1")
        savers = [host.savers() for host in cluster.hosts]
        assert [len(found) for found in savers] == [1, 1, 1], "one saver a host"
        tell(folder, 2)
        job.wait()
    assert noted(folder, 4) == [["committed", "committed"]] * 4
    check(folder, 1, 2)


def from_two_hosts_to_one_to_three(folder: Path) -> None:
    """The next job has another number of hosts, and goes on with the same weights and the same optimizer state."""
    with Cluster(folder, 3) as cluster:
        for target, ranks, *args in (
            ("saves", [1, 1], "fsdp2", "1"),
            ("goes_on", [2], "fsdp2", "1"),
            ("goes_on", [1, 1, 1], "fsdp1", "2"),
        ):
            with cluster.job(f"{HERE}:{target}", ranks, *args) as job:
                job.wait()
    check(folder, 1, 2, 3)
    first, *others = (state_of(folder, number) for number in (1, 2, 3))
    for other in others:
        assert other.keys() == first.keys()
        assert all(other[name].equal(first[name]) for name in first)


def a_cut_that_heals(folder: Path) -> None:
    """While the savers do not hear of each other the training goes on, and nothing is lost."""
    with Cluster(folder, 2) as cluster:
        variables = {"ASYNC_CKPT_LEAD": f"tcp://{cluster.hosts[0].address(SIDE)}:0"}
        with cluster.job(f"{HERE}:saves", [1, 1], "fsdp2", "3", env=variables) as job:
            all_reach(job, "settled-1")
            cluster.cut(cluster.hosts[1], SIDE)
            tell(folder, 2)
            all_reach(job, "trained-2")
            tell(folder, 3)
            all_reach(job, "trained-3")
            assert not (folder / "run/checkpoint-2").exists()
            cluster.heal(cluster.hosts[1], SIDE)
            job.wait()
    assert noted(folder, 2) == [["committed"] * 3] * 2
    check(folder, 1, 2, 3)


def a_slow_wire(folder: Path) -> None:
    """The training does not wait for the wire: both steps after a save are done before half of it has passed."""
    with Cluster(folder, 2) as cluster:
        wire = cluster.keep(Proxy(cluster, delay_s=0.05))
        each = {0: {"ASYNC_CKPT_LEAD": wire.lead_address}, 1: {"ASYNC_CKPT_LEAD": wire.address}}
        with cluster.job(f"{HERE}:saves", [1, 1], "fsdp2", "2", each=each) as job:
            all_reach(job, "settled-1")
            wire.hold_after(4096)
            tell(folder, 2)
            all_reach(job, "trained-2")
            wire.until_held()
            assert not (folder / "run/checkpoint-2").exists()
            wire.let_go()
            job.wait()
    assert noted(folder, 2) == [["committed"] * 2] * 2
    check(folder, 1, 2)


def by_the_environment(folder: Path) -> None:
    """No store: address and keys are the same on all hosts, as files."""
    folder.mkdir()
    public, secret = generate(folder / "job")
    with Cluster(folder, 2) as cluster:
        variables = {
            "ASYNC_CKPT_LEAD": f"tcp://{cluster.hosts[0].address()}:5591",
            "ASYNC_CKPT_CURVE_SECRET": str(secret),
            "ASYNC_CKPT_CURVE_SERVER": str(public),
        }
        with cluster.job(f"{HERE}:without_a_store", [1, 2], env=variables) as job:
            job.wait()
    assert noted(folder, 3) == [["committed"]] * 3
    check(folder, 1)


def with_another_key(folder: Path) -> None:
    """A host whose key the lead does not know is not let in, and is told so."""
    folder.mkdir()
    _, secret = generate(folder / "job")
    _, other = generate(folder / "other")
    with Cluster(folder, 2) as cluster:
        each = {0: {"ASYNC_CKPT_CURVE_SECRET": str(secret)}, 1: {"ASYNC_CKPT_CURVE_SECRET": str(other)}}
        with cluster.job(f"{HERE}:is_refused", [1, 1], "fsdp2", "5", each=each) as job:
            job.wait()
    (first,), (second,) = noted(folder, 2)
    assert "rank 1 of 2 did not attach" in first
    assert "key" in second
    assert not list(folder.glob("run/checkpoint-*"))


def one_that_cannot_take_part(folder: Path, who: str) -> None:
    """Its reason is every rank's, wherever it is."""
    with Cluster(folder, 2) as cluster, cluster.job(f"{HERE}:one_cannot_plan", [1, 2], "plain", who) as job:
        job.wait()
    said = noted(folder, 3)
    assert all("the model is a Linear" in reason for (reason,) in said), said
    assert sum(f"rank {who} cannot take part" in reason for (reason,) in said) == 2, said


def another_model_on_another_host(folder: Path) -> None:
    with Cluster(folder, 2) as cluster, cluster.job(f"{HERE}:has_another_model", [1, 1], "plain", "1") as job:
        job.wait()
    (first,), (second,) = noted(folder, 2)
    assert first == second
    assert "on rank 1, but" in first


def a_notice_to_end_on_another_host(folder: Path) -> None:
    """SIGTERM on one rank: all ranks stop after the same step, and it is committed."""
    with Cluster(folder, 2) as cluster, cluster.job(f"{HERE}:stops_after_the_same_step", [1, 1], "fsdp2") as job:
        all_reach(job, "training")
        os.kill(job.pids[1], signal.SIGTERM)
        job.wait()
    first, second = noted(folder, 2)
    assert first == second == [first[0], "committed"]
    check(folder, int(first[0]))


def where_the_directory_is_not_shared(folder: Path) -> None:
    """It can be written, by rank 0's host, and not be restored; every rank hears of it."""
    with Cluster(folder, 2) as cluster:
        (folder / "run").mkdir()
        cluster.hosts[1].run("mount", "-t", "tmpfs", "none", str(folder / "run"))
        with cluster.job(f"{HERE}:does_not_see", [1, 1], "fsdp2") as job:
            job.wait()
    (first,), (second,) = noted(folder, 2)
    assert first == second
    assert "rank 1 on host host-2 sees no checkpoint" in first
    check(folder, 1, 2)


_ALL: tuple[Callable[[Path], None], ...] = (  # those that take longest first
    where_the_directory_is_not_shared,
    by_torchrun,
    each_host_writes_its_part,
    restarted_by_torchrun,
    from_two_hosts_to_one_to_three,
    three_hosts_with_one_tmpdir,
    a_cut_that_heals,
    a_slow_wire,
    with_another_key,
    by_the_environment,
    another_model_on_another_host,
    a_notice_to_end_on_another_host,
)
_SLOW = ("restarted_by_torchrun", "with_another_key", "another_model_on_another_host", "rank_0_cannot_take_part")
SCENARIOS: dict[str, Scenario] = {
    **{scenario.__name__: scenario for scenario in _ALL},
    **{f"rank_{who}_cannot_take_part": lambda folder, who=who: one_that_cannot_take_part(folder, who) for who in "02"},
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=[pytest.mark.full] if name in _SLOW else []) for name in SCENARIOS]
)
def test_hosts(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected}
        results.update(run_together(chosen, folder, at_once=9))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
