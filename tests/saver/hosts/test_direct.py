"""--shared-fs direct: every host writes its own part of one checkpoint, and the lead commits when all of them have."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import async_ckpt
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import FORMAT, FORMAT_IN_PIECES, MANIFEST_NAME, read_manifest
from async_ckpt.core.pieces import stops_of
from async_ckpt.core.protocol import Bye, Options, SaveRecord, Status, StatusWanted
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import Phase, RunRecord, StateFile
from async_ckpt_saver.hosts.spans import Span
from async_ckpt_saver.image import RunImage
from async_ckpt_saver.run import Commit
from async_ckpt_saver.status import RunStatus, decode_status
from async_ckpt_saver.verification import verify
from async_ckpt_saver.writer import CommitError, CommitJob, commit
from tests.saver.hosts.two_hosts import FILE, LAYOUT, Host, Job, hosts, possible, status_of
from tests.saver.saver_process import Peer, until

pytestmark = pytest.mark.skipif(not possible(), reason="needs the right to make mount namespaces (root)")


def run_of(host: Host) -> RunStatus:
    with Peer(host.endpoint) as peer:
        peer.say(StatusWanted())
        (run,) = decode_status(peer.hear(Status).report).runs
        return run


def whole(job: Job, step: int) -> None:
    """Committed on every rank, byte for byte, and nothing of the attempt is left."""
    job.committed(step)
    path = job.directory / f"checkpoint-{step}"
    report = verify(path)
    assert [each for each in report.damage if "rank-" not in each.file] == []  # those of the tests are no objects
    assert report.unlisted == []
    assert not list(job.directory.glob(".*"))


def handed_over(lead: Host) -> int:
    return sum(host.relayed_bytes for host in status_of(lead))


@pytest.mark.parametrize("plain", [False, True])
def test_each_host_writes_its_part_and_no_byte_of_it_goes_over_the_link(folder: Path, plain: bool) -> None:
    with hosts(folder, folder / "root", direct="ab") as (lead, relay):
        job = Job([lead, relay, relay], folder / "root/run", plain=plain).start()
        try:
            assert run_of(lead).hosts_write
            assert run_of(relay).hosts_write
            for step, slot in ((1, 0), (2, 1), (3, 0)):
                for rank in job.ranks:
                    rank.stage(step, slot)
                whole(job, step)
                manifest = read_manifest(job.directory / f"checkpoint-{step}")
                assert manifest.format == FORMAT_IN_PIECES
                assert manifest.files[FILE.path].xxh3_128 == ""
                assert list(manifest.in_pieces) == [FILE.path]
            assert handed_over(lead) == 0
            assert job.wire.passed_bytes < 200_000
            for rank in job.ranks:
                rank.peer.say(Bye(seq=99))
            until(lambda: not lead.runs() and not relay.runs(), "no run in shared memory")
        finally:
            job.close()


def test_the_lead_has_no_room_for_what_others_write_and_nobody_takes_its_image_for_a_checkpoint(folder: Path) -> None:
    """Neither ranks of its host, nor a job that comes back after all ranks have died."""
    with hosts(folder, folder / "root", direct="ab") as (lead, relay):
        job = Job([lead, relay], folder / "root/run").start()
        try:
            image = lead.runs()[0] / "slot-0" / FILE.path
            assert image.stat().st_size == FILE.total_bytes
            assert image.stat().st_blocks * 512 <= FILE.total_bytes // 2 + 4 * 4096
            for rank in job.ranks:
                rank.stage(1)
            whole(job, 1)
            state = StateFile(lead.runs()[0] / "slot-0.state")
            assert (state.complete_step(), state.whole_step()) == (1, None)
            state.close()
            for rank in job.ranks:
                rank.kill()
            until(lambda: not lead.runs() and not relay.runs(), "no image is kept")
        finally:
            job.close()
        again = Job([lead, relay], folder / "root/run", job="again").start()
        try:
            for started in again.started:
                assert started.resume is not None
                assert (started.resume.step, started.resume.image) == (1, None)
        finally:
            again.close()


def test_damage_in_such_a_checkpoint_is_placed_and_not_copied_to_a_second_tier(folder: Path) -> None:
    with hosts(folder, folder / "root", direct="ab") as (lead, relay):
        job = Job([lead, relay], folder / "root/run").start()
        try:
            for rank in job.ranks:
                rank.stage(1)
            whole(job, 1)
        finally:
            job.close()
    path = folder / "root/run/checkpoint-1"
    manifest = read_manifest(path)
    copy = CommitJob(str(folder / "second"), 1, str(path), tuple(manifest.files), run=manifest.run,
                     original=(path / MANIFEST_NAME).read_bytes())  # fmt: skip
    commit(copy)
    there = folder / "second/checkpoint-1"
    assert (there / MANIFEST_NAME).read_bytes() == (path / MANIFEST_NAME).read_bytes()
    assert all("rank-" in each.file for each in verify(there).damage)
    stops = [0, *stops_of(manifest.in_pieces[FILE.path])]
    assert len(stops) > 5
    with (path / FILE.path).open("r+b") as file:
        file.seek(stops[2])
        byte = file.read(1)
        file.seek(stops[2])
        file.write(bytes([byte[0] ^ 1]))
    (damage,) = [each for each in verify(path).damage if each.file == FILE.path]
    assert (damage.start, damage.stop, len(damage.tensors)) == (stops[2], stops[3], 1)
    with pytest.raises(CommitError, match="is not what its manifest says"):
        commit(msgspec.structs.replace(copy, directory=str(folder / "third")))
    assert not (folder / "third/checkpoint-1").exists()


def test_no_job_is_made_of_an_image_with_holes(folder: Path) -> None:
    """Whatever the journal says of it, nor of a whole one with parts of others."""
    record = RunRecord(
        "job", Options(str(folder), 2, 1, Policy(), 60.0), [FILE.path], [], None, {}, hosts_write=True
    )  # fmt: skip
    half = Span(0, FILE.total_bytes // 2, FILE.total_bytes)
    for hosts_write in (True, False):
        record = msgspec.structs.replace(record, hosts_write=hosts_write)
        image = RunImage.create(f"ipc://{folder}/saver.sock", record, LAYOUT, {1: [half]})
        try:
            image.slots[0].write_record(0, SaveRecord(1, {}, None, {}))
            for rank in (0, 1):
                image.states[0].mark(rank, Phase.STAGED, 1)
            if hosts_write:
                assert image.newest_image() is None
                with pytest.raises(CheckpointError, match="only this host's part"):
                    image.commit_job(Commit(1, 0))
            else:
                assert image.newest_image() is not None
                assert image.commit_job(Commit(1, 0)).parts is None
        finally:
            image.remove()


@pytest.mark.parametrize(
    ("direct", "options", "why"),
    [
        ("a", {}, "was not started with --shared-fs direct"),
        ("ab", {"replicas": 1}, "replicas=1 copies from the lead's image"),
        ("ab", {"upload_to": "second"}, "with tiers the first one is a directory of one host"),
        ("b", {}, ""),
    ],
    ids=["the relay was not told so", "replicas", "tiers", "the lead was not told so"],
)
def test_where_not_all_can_write_all_hand_over_and_it_is_said_why(
    folder: Path, direct: str, options: dict[str, object], why: str
) -> None:
    if "upload_to" in options:
        options = {"upload_to": str(folder / "root/second")}
    with hosts(folder, folder / "root", direct=direct) as (lead, relay):
        job = Job([lead, relay], folder / "root/run", **options).start()
        try:
            for rank in job.ranks:
                rank.stage(1)
            job.committed(1)
            assert handed_over(lead) > FILE.total_bytes // 3
            run = run_of(lead)
            assert not run.hosts_write
            assert why in run.not_direct
            assert bool(run.not_direct) == bool(why)
            assert why in lead.saver.said()
            assert read_manifest(job.directory / "checkpoint-1").format == FORMAT
        finally:
            job.close()


def test_a_relay_that_may_not_write_there_is_an_error_at_attach(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    with hosts(folder, folder / "root", direct="ab") as (lead, relay):
        relay.saver.process.terminate()
        relay.saver.process.wait(30)
        relay.root = folder / "elsewhere"
        relay.start()
        job = Job([lead, relay], folder / "root/run")
        try:
            for rank in job.ranks:
                reason = rank.refused()
                assert "is outside the root" in reason
                assert "--shared-fs direct" in reason
        finally:
            job.close()


def test_a_host_with_another_mount_fails_the_step_and_says_what_is_missing(folder: Path) -> None:
    """The previous checkpoint stands, and once the mount is there it goes on."""
    run = folder / "root/run"
    with hosts(folder, folder / "root", direct="ab") as (lead, relay):
        job = Job([lead, relay], run).start()
        try:
            for rank in job.ranks:
                rank.stage(1)
            whole(job, 1)
            relay.in_its_mounts("mount", "-t", "tmpfs", "none", str(run))
            for rank in job.ranks:
                rank.stage(2, 1)
            for rank in job.ranks:
                settled = rank.settled(2)
                assert settled.outcome == "failed"
                assert "needs one filesystem at" in settled.reason
            assert async_ckpt.latest(run) == run / "checkpoint-1"
            assert not list(run.glob(".*"))
            relay.in_its_mounts("umount", str(run))
            for rank in job.ranks:
                rank.stage(3, 0)
            whole(job, 3)
        finally:
            job.close()
