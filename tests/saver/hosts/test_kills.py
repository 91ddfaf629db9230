"""SIGKILL of the lead, of a relay and of a rank, at every state of a transfer: what was staged is committed, byte for
byte, once the saver is back; what was not is dropped, and the one before it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

import async_ckpt
from async_ckpt.core.slots import Phase, StateFile
from tests.saver.hosts.two_hosts import FILE, Host, Job, Rank, hosts, possible
from tests.saver.saver_process import until

pytestmark = pytest.mark.skipif(not possible(), reason="needs the right to make mount namespaces (root)")


def phase(host: Host, rank: Rank, slot: int) -> Phase:
    """The cell of `rank` in the journal of `host`."""
    run = host.runs()[0]
    state = StateFile(run / f"slot-{slot}.state")
    try:
        return state.cell(rank.rank).phase
    finally:
        state.close()


def stage_until(job: Job, lead: Host, state: str) -> None:
    """Step 2 in slot 1: by rank 1, and handed over as far as `state` says."""
    near, far = job.ranks
    if state == "before any piece":
        job.wire.hold()
        far.stage(2, 1)
        until(lambda: job.wire.held, "the wire is full")
    elif state == "mid-transfer":
        job.wire.hold(after_bytes=FILE.total_bytes // 4)
        far.stage(2, 1)
        until(lambda: job.wire.held, "the wire is full")
        assert phase(lead, far, 1) is Phase.WRITING
    else:
        far.stage(2, 1)
        until(lambda: phase(lead, far, 1) is Phase.STAGED, "all of it is at the lead")
        if state == "after commit":
            near.stage(2, 1)
            assert near.settled(2).outcome == "committed"


STATES = ["before any piece", "mid-transfer", "after all pieces", "after commit"]


EVERY_DAY = [("lead", "mid-transfer"), ("relay", "mid-transfer"), ("lead", "after all pieces"),
             ("relay", "before any piece"), ("lead", "after commit")]  # fmt: skip
OTHERS = [(victim, state) for victim in ("lead", "relay") for state in STATES if (victim, state) not in EVERY_DAY]


@pytest.mark.parametrize(
    ("victim", "state"), [*EVERY_DAY, *(pytest.param(*each, marks=pytest.mark.full) for each in OTHERS)]
)
def test_a_saver_that_is_killed_loses_nothing_staged(folder: Path, victim: str, state: str) -> None:
    with hosts(folder, folder / "root") as made:
        lead, relay = made
        job = Job(made, folder / "root/run").start()
        try:
            for rank in job.ranks:
                rank.stage(1)
            job.committed(1)
            stage_until(job, lead, state)
            killed = lead if victim == "lead" else relay
            killed.kill()
            job.wire.let_go()
            killed.start()
            if state != "after commit":
                job.ranks[0].stage(2, 1)
            job.committed(2)
            for rank in job.ranks:  # and it goes on
                rank.stage(3, 0)
            job.committed(3)
        finally:
            job.close()


@pytest.mark.parametrize("state", STATES[:3])
def test_what_a_killed_rank_of_another_host_had_staged_is_committed(folder: Path, state: str) -> None:
    """Its word of it is lost with it, too."""
    with hosts(folder, folder / "root") as made:
        lead, relay = made
        job = Job(made, folder / "root/run").start()
        try:
            near, far = job.ranks
            if state == "before any piece":
                job.wire.hold()
                far.stage(2, 1, say=False)
            else:
                stage_until(job, lead, state)
            far.kill()
            job.wire.let_go()
            near.stage(2, 1)
            assert near.settled(2).outcome == "committed"
            assert (job.directory / "checkpoint-2" / FILE.path).stat().st_size == FILE.total_bytes
            near.stage(3, 0)
            assert near.settled(3).outcome == "failed"
            until(lambda: not relay.runs(), "the relay has nothing left to hand over")
            assert async_ckpt.latest(job.directory) == job.directory / "checkpoint-2"
        finally:
            job.close()


def test_a_host_that_is_lost_before_it_has_handed_over_drops_that_step_and_the_previous_stands(folder: Path) -> None:
    """The third host goes on being served."""
    with hosts(folder, folder / "root", "abc", lease_s=3.0) as made:
        job = Job(made, folder / "root/run").start()
        try:
            for rank in job.ranks:
                rank.stage(1)
            job.committed(1)
            job.ranks[2].stage(2, 1)
            until(lambda: phase(made[0], job.ranks[2], 1) is Phase.STAGED, "the third host has handed over")
            job.ranks[0].stage(2, 1)
            made[1].kill()
            for rank in (job.ranks[0], job.ranks[2]):
                settled = rank.settled(2)
                assert settled.outcome == "failed"
                assert "rank 1 of 3 died before it had staged" in settled.reason
            assert async_ckpt.latest(job.directory) == job.directory / "checkpoint-1"
        finally:
            job.close()


def test_a_link_that_is_cut_for_less_than_a_lease_loses_nothing(folder: Path) -> None:
    with hosts(folder, folder / "root") as made:
        job = Job(made, folder / "root/run").start()
        try:
            job.wire.hold(after_bytes=FILE.total_bytes // 4)
            job.ranks[1].stage(1)
            until(lambda: job.wire.held, "the wire is full")
            job.wire.cut()
            job.ranks[0].stage(1)
            job.wire.let_go()
            job.committed(1)
        finally:
            job.close()
