"""Committed here, copied to the store behind: alike to the byte, whatever happens to store, saver and disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Url
from async_ckpt.core.objects import Objects
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import endpoint_key, read_journals, shm_root
from async_ckpt_saver.multipart import upload_image_file
from async_ckpt_saver.object_collection import abort_uploads, unfinished_uploads
from tests.cloud.proxy import Proxy
from tests.cloud.tiered import FILE, Tiered
from tests.cloud.weed import Weed
from tests.saver.committing import ADAPTER, make_image
from tests.saver.saver_process import Peer, until

_MIDDLE = 12 << 20  # bytes after which an upload is in the middle


def tiered_notes(tiered: Tiered) -> list[Path]:
    """What is noted of uploads that are not done."""
    return list(shm_root().glob(f"uploads-{endpoint_key(tiered.endpoint)}-*"))


@pytest.fixture
def tiered(proxied: tuple[Url, Proxy], weed: Weed, folder: Path) -> Iterator[Tiered]:
    folder.chmod(0o700)  # the saver listens in it
    url, proxy = proxied
    made = Tiered(folder, url, proxy, weed)
    yield made
    proxy.say("pass")
    assert list(read_journals(made.endpoint)) == []
    assert tiered_notes(made) == []
    objects = Objects(url)
    assert unfinished_uploads(objects, url) == []
    assert {path.partition("/")[0] for path in objects.walk(url.key)} == {f"checkpoint-{step}" for step in made.there()}


def test_a_save_is_committed_here_and_copied_to_the_byte(tiered: Tiered) -> None:
    with tiered.saver(), Peer(tiered.endpoint) as peer:
        tiered.start(peer)
        settled = tiered.commit(5)
        assert (settled.outcome, settled.path) == ("committed", f"{tiered.local}/checkpoint-5")
        uploaded = tiered.uploaded(5)
        assert (uploaded.outcome, uploaded.url) == ("uploaded", f"{tiered.url}/checkpoint-5")
        tiered.assert_alike(5)
        tiered.leave()
    assert (tiered.here(), tiered.there()) == ([5], [5])


def test_while_the_store_is_down_saves_are_committed_and_the_newest_is_copied_when_it_is_back(tiered: Tiered) -> None:
    with tiered.saver(), Peer(tiered.endpoint) as peer:
        tiered.start(peer)
        tiered.proxy.say("cut")
        for step in (1, 2, 3, 4):
            assert tiered.commit(step).outcome == "committed"
        dropped = [tiered.uploaded(step) for step in (2, 3)]
        assert [each.outcome for each in dropped] == ["dropped", "dropped"]
        assert "step 3 was committed before its upload began" in dropped[0].reason
        assert tiered.open_uploads([1, 4]) == [1, 4]
        tiered.proxy.say("pass")
        assert [tiered.uploaded(step).outcome for step in (1, 4)] == ["uploaded", "uploaded"]
        for step in (1, 4):
            tiered.assert_alike(step)
        tiered.leave()
    assert (tiered.here(), tiered.there()) == ([1, 2, 3, 4], [1, 4])


def test_a_saver_killed_in_mid_upload_is_followed_by_one_that_ends_it(tiered: Tiered) -> None:
    with Peer(tiered.endpoint) as peer:
        first = tiered.saver()
        tiered.start(peer)
        tiered.proxy.stop_after(_MIDDLE)
        assert tiered.commit(1).outcome == "committed"
        assert tiered.proxy.stopped.wait(30)
        first.kill()
        tiered.proxy.say("pass")
        assert tiered.there() == []
        with tiered.saver():
            assert tiered.uploaded(1).outcome == "uploaded"
            tiered.assert_alike(1)
            assert tiered.commit(2).outcome == "committed"
            assert tiered.uploaded(2).outcome == "uploaded"
            tiered.leave()
    assert tiered.there() == [1, 2]


def killed_when_its_job_had_left(tiered: Tiered) -> None:
    """In mid-upload of step 2."""
    with Peer(tiered.endpoint) as peer:
        first = tiered.saver()
        tiered.start(peer)
        assert tiered.commit(1).outcome == "committed"
        assert tiered.uploaded(1).outcome == "uploaded"
        tiered.proxy.stop_after(_MIDDLE)
        assert tiered.commit(2).outcome == "committed"
        assert tiered.proxy.stopped.wait(30)
        tiered.leave()
        until(lambda: list(read_journals(tiered.endpoint)) == [], "the run is over")
        first.kill()
    assert len(tiered_notes(tiered)) == 1


def test_what_a_saver_did_not_upload_the_next_one_uploads_by_itself(tiered: Tiered) -> None:
    killed_when_its_job_had_left(tiered)
    tiered.proxy.say("pass")
    with tiered.saver():
        until(lambda: tiered.there() == [1, 2], f"step 2 in the store: {tiered.log.read_text()[-2000:]}", 60.0)
        until(lambda: not tiered_notes(tiered), "the note is gone")
    tiered.assert_alike(2)


def test_a_note_stays_until_a_saver_could_upload(tiered: Tiered) -> None:
    """The first successor is killed as well; to the second one the store is closed; the third one is let in."""
    killed_when_its_job_had_left(tiered)
    tiered.proxy.say("pass")
    tiered.proxy.stop_after(_MIDDLE)
    second = tiered.saver()
    assert tiered.proxy.stopped.wait(30)
    second.kill()
    tiered.proxy.say("skewed")
    with tiered.saver() as third:
        until(lambda: "cannot be compared" in third.said(), "the store lets nobody look", 60.0)
    assert len(tiered_notes(tiered)) == 1
    tiered.proxy.say("pass")
    with tiered.saver():
        until(lambda: tiered.there() == [1, 2] and not tiered_notes(tiered), "all is uploaded", 60.0)
    tiered.assert_alike(2)


def test_what_a_saver_did_not_upload_the_next_job_uploads(tiered: Tiered) -> None:
    """Also where nothing in shared memory tells of it: the two tiers do."""
    killed_when_its_job_had_left(tiered)
    tiered.proxy.say("pass")
    for noted in tiered_notes(tiered):
        noted.unlink()
    with tiered.saver(), Peer(tiered.endpoint) as peer:
        tiered.start(peer, job="next")
        assert tiered.uploaded(2).outcome == "uploaded"
        tiered.assert_alike(2)
        tiered.leave()
    assert tiered.there() == [1, 2]


def test_a_saver_that_is_stopped_leaves_the_upload_to_the_next_one_after_its_grace(tiered: Tiered) -> None:
    with Peer(tiered.endpoint) as peer:
        first = tiered.saver("--grace-s", "0.5")
        tiered.start(peer)
        tiered.proxy.stop_after(_MIDDLE)
        assert tiered.commit(1).outcome == "committed"
        assert tiered.proxy.stopped.wait(30)
        tiered.leave()
        first.process.terminate()
        assert first.process.wait(20) == -15  # long before the upload's own 60 s
        assert "uploading, for 0.5 s at most" in first.said()
        tiered.proxy.say("pass")
    with tiered.saver(), Peer(tiered.endpoint) as peer:
        tiered.start(peer, job="next")
        assert tiered.uploaded(1).outcome == "uploaded"
        tiered.assert_alike(1)
        tiered.leave()


def test_a_store_that_is_full_fails_the_upload_and_no_save(tiered: Tiered) -> None:
    with tiered.saver(), Peer(tiered.endpoint) as peer:
        tiered.start(peer, policy=Policy(keep_every=2))
        tiered.proxy.say("full")
        assert tiered.commit(2).outcome == "committed"
        failed = tiered.uploaded(2)
        assert failed.outcome == "failed"
        assert "the store is full: free some space there" in failed.reason
        assert tiered.here() == [2]
        tiered.proxy.say("pass")
        assert tiered.there() == []
        assert tiered.commit(3).outcome == "committed"
        assert tiered.uploaded(3).outcome == "uploaded"
        until(lambda: tiered.there() == [2, 3], "what had failed, and keep_every wants, comes with the next one")
        tiered.assert_alike(2)
        tiered.leave()


def test_a_backlog_is_bounded_and_retention_waits_for_what_is_to_be_copied(tiered: Tiered) -> None:
    """One is stuck on its way, and rules keep the newest and every fourth."""
    with tiered.saver(), Peer(tiered.endpoint) as peer:
        tiered.start(peer, policy=Policy(keep_last=1, keep_every=4))
        tiered.proxy.stop_after(_MIDDLE)
        held = {1: [1], 2: [1, 2], 3: [1, 3], 4: [1, 4], 5: [1, 4, 5], 6: [1, 4, 6], 7: [1, 4, 7]}
        for step, expected in held.items():
            assert tiered.commit(step).outcome == "committed"
            if step == 1:
                assert tiered.proxy.stopped.wait(30)
            until(lambda expected=expected: tiered.here() == expected, f"{expected} after {step}")  # type: ignore[misc]
        assert [tiered.uploaded(step).outcome for step in (2, 3, 5, 6)] == ["dropped"] * 4
        assert tiered.open_uploads([1, 4, 7]) == [1, 4, 7]
        tiered.proxy.say("pass")
        assert [tiered.uploaded(step).outcome for step in (1, 7, 4)] == ["uploaded"] * 3
        until(lambda: (tiered.here(), tiered.there()) == ([4, 7], [4, 7]), "retention in both tiers")
        for step in (4, 7):
            tiered.assert_alike(step)
        tiered.leave()


def test_a_checkpoint_that_is_damaged_here_is_not_copied(tiered: Tiered) -> None:
    with tiered.saver(), Peer(tiered.endpoint) as peer:
        tiered.start(peer)
        tiered.proxy.say("cut")
        assert tiered.commit(1).outcome == "committed"
        path = tiered.local / "checkpoint-1" / FILE.path
        with path.open("r+b") as file:
            file.seek(FILE.total_bytes - 1)
            file.write(bytes([path.read_bytes()[-1] ^ 1]))
        tiered.proxy.say("pass")
        failed = tiered.uploaded(1)
        assert failed.outcome == "failed"
        assert f"{path} is not what its manifest says: it is damaged" in failed.reason
        tiered.leave()
    for noted in tiered_notes(tiered):  # for a saver that could do it
        noted.unlink()
    assert tiered.there() == []


def test_a_machine_that_was_lost_goes_on_from_the_store(tiered: Tiered) -> None:
    with tiered.saver(), Peer(tiered.endpoint) as peer:
        tiered.start(peer)
        for step in (1, 2):
            assert tiered.commit(step).outcome == "committed"
            assert tiered.uploaded(step).outcome == "uploaded"
        tiered.leave()
    tiered.lose_local()
    with tiered.saver(), Peer(tiered.endpoint) as peer:
        started = tiered.start(peer, job="next")
        assert started.resume is not None
        assert (started.resume.step, started.resume.path) == (2, f"{tiered.url}/checkpoint-2")
        assert started.newest_step == 2
        tiered.leave()


def test_a_mistake_in_how_the_store_is_used_is_told_at_once(tiered: Tiered) -> None:
    with tiered.saver(), Peer(tiered.endpoint) as peer:
        tiered.proxy.say("skewed")
        assert "this host's clock differs from the store's" in tiered.refused(peer)
        assert not tiered.local.exists()


def test_a_file_that_is_cut_off_while_it_is_copied_fails_the_upload_and_nothing_else(
    url: Url, objects: Objects, folder: Path
) -> None:
    """Mapped, it would be SIGBUS, and so would an error of the disk."""
    path = make_image(folder / "image", adapter_bytes=24 << 20) / ADAPTER
    parts = 0

    def before_part() -> None:
        nonlocal parts
        parts += 1
        if parts == 2:
            os.truncate(path, 1 << 20)

    with pytest.raises(CheckpointError, match="was cut off while it was read"):
        upload_image_file(objects, (url / "cut").key, str(path.parent), ADAPTER, before_part, mapped=False)
    assert parts == 2
    assert objects.walk(url.key) == {}
    abort_uploads(objects, url)
