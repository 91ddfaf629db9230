"""SIGKILL of a relay and of the lead in the middle of a commit that both write: once the saver is back the step is
committed, byte for byte. A host that does not come back, or cannot write, fails the step, and the one before it stands.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import async_ckpt
from async_ckpt.core.protocol import Bye
from async_ckpt.core.slots import Phase
from tests.saver.hosts.test_direct import whole
from tests.saver.hosts.test_kills import phase
from tests.saver.hosts.two_hosts import FILE, Host, Job, hosts, possible
from tests.saver.saver_process import until
from tests.system.faults import Faults, missing

pytestmark = [
    pytest.mark.skipif(not possible(), reason="needs the right to make mount namespaces (root)"),
    pytest.mark.skipif(bool(missing("cc")), reason=missing("cc") or ""),
]

# Of the lead: its part, three small files, the manifest, two directories, and, renamed, the parent, twice.
LEAD_SYNCS = 9


def faults_of(folder: Path, name: str) -> Faults:
    """Of the saver of that host."""
    return Faults(folder / f"faults-{name}", folder / "root")


def started(folder: Path, made: list[Host]) -> Job:
    """Step 1 is committed, and of step 2, in slot 1, all is staged but what rank 0 has."""
    job = Job(made, folder / "root/run").start()
    for rank in job.ranks:
        rank.stage(1)
    whole(job, 1)
    for rank in job.ranks[1:]:
        rank.stage(2, 1)
        until(lambda rank=rank: phase(made[0], rank, 1) is Phase.STAGED, "the lead knows it")
    return job


def hidden(job: Job) -> list[str]:
    return sorted(path.name for path in job.directory.glob(".checkpoint-*"))


def goes_on(job: Job) -> None:
    whole(job, 2)
    for rank in job.ranks:
        rank.stage(3, 0)
    whole(job, 3)


@pytest.mark.parametrize("held", ["before its sync", pytest.param("before its answer arrives", marks=pytest.mark.full)])
def test_a_relay_that_is_killed_is_asked_again_by_its_successors_session(folder: Path, held: str) -> None:
    faults = faults_of(folder, "b").build()
    with hosts(folder, folder / "root", direct="ab", envs={"b": faults.environment}) as made:
        lead, relay = made
        job = started(folder, made)
        try:
            if held == "before its sync":
                faults.hold_sync(1)
            else:
                job.wire.hold()
            job.ranks[0].stage(2, 1)
            if held == "before its sync":
                faults.until_held()
            else:
                until(lambda: relay.saver.said().count("part of this host is written") == 2, "it has written its part")
            (attempt,) = hidden(job)
            relay.kill()
            faults.none()
            job.wire.let_go()
            assert not (job.directory / "checkpoint-2").exists()
            relay.start()
            whole(job, 2)
            assert lead.saver.said().count(attempt) == 0  # that attempt was not given up
            goes_on(job)
        finally:
            job.close()


EVERY_DAY = ("relay", 1), ("lead", 1), ("lead", 8)
OTHERS = [("lead", number) for number in range(1, LEAD_SYNCS + 1) if ("lead", number) not in EVERY_DAY]


@pytest.mark.parametrize(
    ("holds", "number"), [*EVERY_DAY, *(pytest.param(*each, marks=pytest.mark.full) for each in OTHERS)]
)
def test_a_lead_that_is_killed_in_mid_commit_is_followed_by_one_that_asks_again(
    folder: Path, holds: str, number: int
) -> None:
    """At each of its syncs, and while the relay is at its own. The successor was not told --shared-fs direct."""
    name = "a" if holds == "lead" else "b"
    faults = faults_of(folder, name).build()
    with hosts(folder, folder / "root", direct="ab", envs={name: faults.environment}) as made:
        lead, relay = made
        job = started(folder, made)
        try:
            faults.hold_sync(number)
            job.ranks[0].stage(2, 1)
            faults.until_held()
            lead.kill()
            faults.none()
            lead.start("--shared-fs", "relay")
            goes_on(job)
            written = relay.saver.said().count("part of this host is written")
            assert written >= 3, "each of its three steps at least once"
        finally:
            job.close()


@pytest.mark.full
def test_both_are_killed(folder: Path) -> None:
    faults = faults_of(folder, "b").build()
    with hosts(folder, folder / "root", direct="ab", envs={"b": faults.environment}) as made:
        lead, relay = made
        job = started(folder, made)
        try:
            faults.hold_sync(1)
            job.ranks[0].stage(2, 1)
            faults.until_held()
            lead.kill()
            relay.kill()
            faults.none()
            relay.start()
            lead.start()
            goes_on(job)
        finally:
            job.close()


@pytest.mark.parametrize(
    "successor", [pytest.param(False, marks=pytest.mark.full), True], ids=["the lead lives", "the lead was replaced"]
)
def test_a_host_that_is_lost_in_mid_commit_fails_the_step(folder: Path, successor: bool) -> None:
    """Above all for a lead that knows only its journal, in which every rank has staged it: a checkpoint with holes in
    it would be the worst of all."""
    faults = faults_of(folder, "b").build()
    with hosts(folder, folder / "root", direct="ab", lease_s=3.0, envs={"b": faults.environment}) as made:
        lead, relay = made
        job = started(folder, made)
        try:
            faults.hold_sync(1)
            job.ranks[0].stage(2, 1)
            faults.until_held()
            relay.kill()
            if successor:
                lead.kill()
                lead.start()
            settled = job.ranks[0].settled(2)
            assert settled.outcome == "failed"
            assert "it was lost before it had written its part" in settled.reason
            assert "rank 1" in settled.reason or os.uname().nodename in settled.reason
            assert async_ckpt.latest(job.directory) == job.directory / "checkpoint-1"
            assert hidden(job) == []
        finally:
            job.close()


def test_what_killed_ranks_had_staged_is_committed(folder: Path) -> None:
    """Their hosts' savers live: the relay keeps what it has until the outcome."""
    faults = faults_of(folder, "b").build()
    with hosts(folder, folder / "root", direct="ab", envs={"b": faults.environment}) as made:
        _, relay = made
        job = started(folder, made)
        try:
            faults.hold_sync(1)
            job.ranks[0].stage(2, 1)
            faults.until_held()
            for rank in job.ranks:
                rank.kill()
            until(lambda: "rank 1 of" in relay.saver.said(), "its relay has seen that rank 1 is gone")
            faults.none()
            until(lambda: (job.directory / "checkpoint-2").exists(), "it is committed")
            until(lambda: not any(host.runs() for host in made), "nothing is left in shared memory")
            whole_file = (job.directory / "checkpoint-2" / FILE.path).read_bytes()
            assert len(whole_file) == FILE.total_bytes
        finally:
            job.close()


@pytest.mark.parametrize("name", [pytest.param("a", marks=pytest.mark.full), "b"], ids=["lead", "relay"])
def test_a_disk_that_fails_under_one_host_fails_the_step_and_the_next_is_tried(folder: Path, name: str) -> None:
    faults = faults_of(folder, name).build()
    with hosts(folder, folder / "root", direct="ab", envs={name: faults.environment}) as made:
        job = started(folder, made)
        try:
            faults.fail_sync(1, errno.ENOSPC)
            job.ranks[0].stage(2, 1)
            for rank in job.ranks:
                settled = rank.settled(2)
                assert settled.outcome == "failed"
                assert "No space left on device" in settled.reason
                assert "keep fewer checkpoints" in settled.reason
            assert async_ckpt.latest(job.directory) == job.directory / "checkpoint-1"
            assert hidden(job) == []
            faults.none()
            for rank in job.ranks:
                rank.stage(3, 0)
            whole(job, 3)
        finally:
            job.close()


def test_a_relay_that_is_told_to_end_waits_for_the_outcome_of_what_its_dead_ranks_had_staged(folder: Path) -> None:
    with hosts(folder, folder / "root", direct="ab") as made:
        _, relay = made
        relay.kill()
        relay.start("--grace-s", "60")
        job = started(folder, made)
        try:
            job.ranks[1].kill()
            until(lambda: "rank 1 of" in relay.saver.said(), "its relay has seen that rank 1 is gone")
            relay.saver.process.terminate()
            until(lambda: "signal 15: serving" in relay.saver.said(), "it goes on for now")
            job.ranks[0].stage(2, 1)
            assert job.ranks[0].settled(2).outcome == "committed"
            assert relay.saver.process.wait(30) == -15
            assert not relay.runs()
        finally:
            job.close()


def test_a_slot_that_is_taken_while_it_is_written_fails_the_step(folder: Path) -> None:
    """By a rank that does not wait for the outcome: none of ours does, but half of it must not be committed."""
    faults = faults_of(folder, "b").build()
    with hosts(folder, folder / "root", direct="ab", envs={"b": faults.environment}) as made:
        job = started(folder, made)
        try:
            faults.hold_sync(1)
            job.ranks[0].stage(2, 1)
            faults.until_held()
            job.ranks[1].stage(4, 1, say=False)
            faults.none()
            settled = job.ranks[0].settled(2)
            assert settled.outcome == "failed"
            assert "in slot 1 rank 1 has step 4 (STAGED), not step 2" in settled.reason
            assert async_ckpt.latest(job.directory) == job.directory / "checkpoint-1"
        finally:
            job.close()


def test_a_saver_that_is_ended_in_mid_commit_leaves_the_step_to_the_next(folder: Path) -> None:
    """SIGTERM while the other host cannot be reached: it waits for a lease, and nothing is lost."""
    faults = faults_of(folder, "b").build()
    with hosts(folder, folder / "root", direct="ab", lease_s=3.0, envs={"b": faults.environment}) as made:
        lead, _ = made
        job = started(folder, made)
        try:
            faults.hold_sync(1)
            job.ranks[0].stage(2, 1)
            faults.until_held()
            lead.saver.process.terminate()
            lead.saver.process.wait(30)
            assert "is left to the next saver" in lead.saver.said()
            assert hidden(job) == []
            faults.none()
            lead.start()
            goes_on(job)
            for rank in job.ranks:
                rank.peer.say(Bye(seq=99))
            until(lambda: not any(host.runs() for host in made), "nothing is left in shared memory")
        finally:
            job.close()
