"""What a lead has committed lies in the RAM of one other host, whatever is killed on the way; a job that comes back
gets it from there, and one that is damaged is not used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_ckpt.core.manifest import MANIFEST_NAME
from async_ckpt.core.protocol import Bye, Refused, Resume
from async_ckpt.core.slots import Phase
from tests.saver.hosts.test_kills import phase
from tests.saver.hosts.two_hosts import FILE, Host, Job, content, hosts, possible, status_of
from tests.saver.saver_process import until

pytestmark = pytest.mark.skipif(not possible(), reason="needs the right to make mount namespaces (root)")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(host: Host, job: Job, step: int) -> None:
    """Until `host` keeps this one alone, and all of it."""

    def same() -> bool:
        with contextlib.suppress(OSError):
            return [files(copy) for copy in host.copies()] == [files(job.directory / f"checkpoint-{step}")]
        return False

    until(same, f"a copy of step {step} on {host.name}: {host.saver.said()[-2000:]}")


def save(job: Job, step: int, slot: int) -> None:
    for rank in job.ranks:
        rank.stage(step, slot)
    job.committed(step)


def goodbye(job: Job, *made: Host) -> None:
    """Then nothing is left on any host."""
    for rank in job.ranks:
        rank.peer.say(Bye(seq=99))
    until(lambda: not any(host.runs() or host.copies() or host.copies(whole=False) for host in made), "nothing left")


@contextlib.contextmanager
def saved(folder: Path, names: str = "ab", *, lease_s: float = 30.0) -> Iterator[tuple[list[Host], Job]]:
    """A job with one step that is committed and copied."""
    with hosts(folder, folder / "root", names, lease_s=lease_s) as made:
        job = Job(made, folder / "root/run", replicas=1).start()
        try:
            save(job, 1, 0)
            copied(made[1], job, 1)
            yield made, job
        finally:
            job.close()


@contextlib.contextmanager
def again(made: list[Host], directory: Path, *, replicas: int = 1) -> Iterator[Job]:
    """The job that comes back."""
    job = Job(made, directory, job="again", replicas=replicas)
    try:
        yield job.start()
    finally:
        job.close()


def lose(host: Host, job: Job) -> None:
    """With all that was in its memory; the other ranks are killed."""
    host.kill()
    host.stop()
    for rank in job.ranks:
        rank.kill()


def resumes(job: Job) -> list[Resume]:
    return [started.resume for started in job.started if started.resume is not None]


def test_the_first_relay_keeps_the_newest_checkpoint_and_no_other_host_does(folder: Path) -> None:
    with saved(folder, "abc") as (made, job):
        for step, slot in ((2, 1), (3, 0)):
            save(job, step, slot)
            copied(made[1], job, step)
        assert [len(host.copies()) for host in made] == [0, 1, 0]
        until(lambda: sorted(host.copy_step or 0 for host in status_of(made[0])) == [0, 3], "the lead knows it")
        goodbye(job, *made)


@pytest.mark.parametrize("order", ["bc", pytest.param("cb", marks=pytest.mark.full)])
def test_after_the_loss_of_the_leads_host_all_ranks_find_the_checkpoint_in_ram(folder: Path, order: str) -> None:
    with saved(folder, "abc", lease_s=6.0) as (made, job):
        expected = files(job.directory / "checkpoint-1")
        lose(made[0], job)
        (job.directory / "checkpoint-1" / FILE.path).unlink()  # it is not read
        rest = [host for name in order for host in made if host.name == name]
        with again(rest, job.directory) as second:
            assert [resume.step for resume in resumes(second)] == [1, 1]
            for host, resume in zip(rest, resumes(second), strict=True):
                assert resume.image is not None
                assert files(host.seen_from_here(resume.image)) == expected
            save(second, 2, 0)
            copied(rest[1], second, 2)
            until(lambda: not rest[0].copies(), "the lead keeps no copy beside its slots")
            goodbye(second, *rest)


def test_after_the_loss_of_the_host_with_the_copy_the_leads_image_serves_all(folder: Path) -> None:
    with saved(folder, "abc", lease_s=6.0) as (made, job):
        expected = files(job.directory / "checkpoint-1")
        lose(made[1], job)
        rest = [made[0], made[2]]
        (job.directory / "checkpoint-1" / FILE.path).unlink()
        with again(rest, job.directory) as second:
            for host, resume in zip(rest, resumes(second), strict=True):
                assert resume.image is not None
                found = files(host.seen_from_here(resume.image))
                assert found == expected
            goodbye(second, *rest)


def test_a_copy_that_is_damaged_is_dropped_and_storage_is_read(folder: Path) -> None:
    with saved(folder, "abc") as (made, job):
        (copy,) = made[1].copies()
        with (copy / FILE.path).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        lose(made[0], job)
        for order in ([made[2], made[1]], [made[1], made[2]]):
            with again(order, job.directory) as second:
                assert [(resume.step, resume.image) for resume in resumes(second)] == [(1, None)] * 2
                for rank in second.ranks:
                    rank.kill()
        assert "damaged" in made[1].saver.said() or "does not hash" in made[2].saver.said()


def test_a_job_without_copies_makes_no_use_of_one_and_drops_it_with_its_first_commit(folder: Path) -> None:
    with saved(folder) as (made, job):
        for rank in job.ranks:
            rank.kill()
        with again(made, job.directory, replicas=0) as second:
            first, other = resumes(second)
            assert first.image is not None  # the slot of the job before, as ever
            assert other.image is None
            assert len(made[1].copies()) == 1
            save(second, 2, 0)
            until(lambda: not made[1].copies(), "the copy is dropped")
            goodbye(second, *made)


def test_a_copy_of_what_is_not_the_newest_any_more_is_not_used(folder: Path) -> None:
    """Somebody has moved the newest one away, to go on from an older one: storage decides."""
    with saved(folder, "ab") as (made, job):
        save(job, 2, 1)
        copied(made[1], job, 2)
        for rank in job.ranks:
            rank.kill()
        (job.directory / "checkpoint-2").rename(folder / "away")
        with again(made, job.directory) as second:
            assert [(resume.step, resume.image) for resume in resumes(second)] == [(1, None)] * 2
            goodbye(second, *made)


def _held_in_the_middle(made: list[Host], job: Job, step: int, slot: int) -> None:
    """Step `step` is committed, and its copy begun."""
    job.ranks[1].stage(step, slot)
    until(lambda: phase(made[0], job.ranks[1], slot) is Phase.STAGED, "the relay has handed over")
    job.wire.hold(after_bytes=400)  # of what it says from now on: it asks for the first pieces
    job.ranks[0].stage(step, slot)
    assert job.ranks[0].settled(step).outcome == "committed"
    until(lambda: made[1].copies(whole=False), "a copy in the making")
    until(lambda: job.wire.held, "the wire is full")


@pytest.mark.parametrize("victim", ["lead", "relay", pytest.param("none", marks=pytest.mark.full)])
def test_killed_while_a_copy_is_made_the_older_one_stands_and_the_next_is_copied(folder: Path, victim: str) -> None:
    with saved(folder) as (made, job):
        lead, relay = made
        _held_in_the_middle(made, job, 2, 1)
        assert [files(copy) for copy in relay.copies()] == [files(job.directory / "checkpoint-1")]
        if victim != "none":
            killed = lead if victim == "lead" else relay
            killed.kill()
            assert [files(copy) for copy in relay.copies()] == [files(job.directory / "checkpoint-1")]
            job.wire.let_go()
            killed.start()
        else:
            job.wire.let_go()
        if victim != "lead":  # it knows nothing any more of what it had offered
            copied(relay, job, 2)
        save(job, 3, 0)
        copied(relay, job, 3)
        goodbye(job, *made)


def test_a_step_whose_slot_is_taken_while_it_is_copied_is_given_up_for_the_next(folder: Path) -> None:
    with saved(folder) as (made, job):
        _held_in_the_middle(made, job, 2, 1)
        job.ranks[0].stage(4, 1)
        job.wire.let_go()
        until(lambda: not made[1].copies(whole=False), "the copy of step 2 is given up")
        assert [files(copy) for copy in made[1].copies()] == [files(job.directory / "checkpoint-1")]
        job.ranks[1].stage(4, 1)
        job.committed(4)
        copied(made[1], job, 4)
        goodbye(job, *made)


def test_a_link_that_is_cut_while_a_copy_is_made_goes_on_with_it(folder: Path) -> None:
    with saved(folder) as (made, job):
        _held_in_the_middle(made, job, 2, 1)
        job.wire.cut()
        job.wire.let_go()
        copied(made[1], job, 2)
        goodbye(job, *made)


def test_where_there_is_no_room_for_copies_every_rank_is_refused_with_the_bytes_needed(folder: Path) -> None:
    with hosts(folder, folder / "root") as made:
        # Its two slots fit, two images beside them do not.
        made[1].in_its_mounts("mount", "-o", f"remount,size={FILE.total_bytes * 2}", "/dev/shm")
        job = Job(made, folder / "root/run", replicas=1)
        try:
            for rank in job.ranks:
                assert "which needs" in rank.peer.hear(Refused).reason
            assert not made[1].runs()
        finally:
            job.close()


def test_a_saver_that_is_replaced_keeps_the_copy_and_gives_it_up_when_nobody_comes_back(folder: Path) -> None:
    with saved(folder) as (made, job):
        lose(made[0], job)
        made[1].kill()
        assert len(made[1].copies()) == 1
        made[1].start()
        (copy,) = made[1].copies()
        assert (copy / FILE.path).read_bytes() == content(1)
        assert (copy / MANIFEST_NAME).exists()
        made[1].kill()
        made[1].start("--keep-image-s", "1")
        until(lambda: not made[1].copies() and not made[1].copies(whole=False), "the copy is given up")
        assert "nobody has come back for the copy of step 1" in made[1].saver.said()
