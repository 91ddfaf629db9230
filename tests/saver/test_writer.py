from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from async_ckpt.core.manifest import latest, read_manifest
from async_ckpt_saver import filesystem
from async_ckpt_saver.writer import CommitError, commit
from tests.saver.committing import (
    ADAPTER,
    DOCUMENTS,
    STATE,
    assert_consistent,
    assert_whole,
    failing_at,
    hidden,
    job_of,
)

BEFORE_DURABLE = [
    "mkdir", f"write:{ADAPTER}", f"chunk:{ADAPTER}", f"fsync:{ADAPTER}", f"fsync:{STATE}", "write:README.md",
    "fsync:README.md", "manifest", "fsync:async_ckpt.json", "fsync-directory:training_state", "fsync-directory:.",
    "rename", "fsync-parent",
]  # fmt: skip
AFTER_DURABLE = ["latest", "latest-replace", "fsync-latest", "done"]


def test_a_checkpoint_is_the_image_and_its_documents(run: Path, image: Path) -> None:
    result = commit(job_of(run, 4, image))
    assert result.path == str(run / "checkpoint-4")
    assert_whole(run / "checkpoint-4", image)
    assert result.bytes == (1 << 20) + 17 + 5000 + sum(map(len, DOCUMENTS.values()))
    assert result.latest_moved
    assert os.readlink(run / "latest") == "checkpoint-4"
    manifest = read_manifest(run / "checkpoint-4")
    assert (manifest.step, manifest.metrics, manifest.extra) == (4, {"loss": 0.25}, {"epoch": 1})
    assert (manifest.world, manifest.versions, manifest.run) == (2, {"async_ckpt": "0"}, "run-1")
    assert hidden(run) == []


def test_everything_is_synced_before_the_name_and_the_name_before_latest(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def recording(sync: Callable[[int], None]) -> Callable[[int], None]:
        def record(fd: int) -> None:
            sync(fd)
            events.append(os.readlink(f"/proc/self/fd/{fd}"))

        return record

    run.mkdir()
    monkeypatch.setattr(os, "fsync", recording(os.fsync))
    monkeypatch.setattr(os, "fdatasync", recording(os.fdatasync))
    commit(job_of(run, 4, image), nonce="n", step_hook=events.append)
    temporary = str(run / ".checkpoint-4.n.tmp")
    synced_before_rename = {event for event in events[: events.index("rename")] if event.startswith("/")}
    files = {f"{temporary}/{name}" for name in (ADAPTER, STATE, *DOCUMENTS, "async_ckpt.json")}
    assert synced_before_rename == files | {temporary, f"{temporary}/training_state"}
    # The last file is the manifest, and a directory is synced after everything in it.
    last_file = max(events.index(file) for file in files)
    assert events.index(f"{temporary}/async_ckpt.json") == last_file
    assert last_file < events.index(f"{temporary}/training_state") < events.index(temporary)
    assert events[events.index("rename") :] == [
        "rename", "fsync-parent", str(run), "latest", "latest-replace", "fsync-latest", str(run), "done",
    ]  # fmt: skip


def test_new_parents_of_the_run_are_durable(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    commit(job_of(tmp_path / "a" / "b", 1, image))
    assert synced[:2] == [str(tmp_path), str(tmp_path / "a")]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("point", BEFORE_DURABLE)
def test_a_failure_before_it_is_durable_leaves_nothing(run: Path, image: Path, point: str, code: int) -> None:
    commit(job_of(run, 1, image))
    before = sorted(os.listdir(run))
    with pytest.raises(CommitError, match=os.strerror(code)) as caught:
        commit(job_of(run, 2, image), step_hook=failing_at(point, OSError(code, os.strerror(code))))
    assert (caught.value.errno, str(caught.value)) == (code, caught.value.reason)
    assert "step 2" in caught.value.reason
    assert sorted(os.listdir(run)) == before
    assert latest(run) == run / "checkpoint-1"
    commit(job_of(run, 2, image))
    assert assert_consistent(run, image) == [1, 2]


@pytest.mark.parametrize("point", AFTER_DURABLE)
def test_a_failure_to_move_latest_leaves_the_checkpoint(
    run: Path, image: Path, point: str, caplog: pytest.LogCaptureFixture
) -> None:
    commit(job_of(run, 1, image))
    result = commit(job_of(run, 2, image), step_hook=failing_at(point, OSError(errno.EIO, "broken")))
    assert not result.latest_moved
    assert "broken" in caplog.text
    assert assert_consistent(run, image) == [1, 2]
    assert hidden(run) == []
    commit(job_of(run, 3, image))
    assert os.readlink(run / "latest") == "checkpoint-3"


def test_a_bug_is_a_commit_error_and_an_exit_is_not_held_up(run: Path, image: Path) -> None:
    with pytest.raises(CommitError, match="ZeroDivisionError"):
        commit(job_of(run, 1, image), step_hook=failing_at("manifest", ZeroDivisionError()))
    with pytest.raises(SystemExit):
        commit(job_of(run, 1, image), step_hook=failing_at("manifest", SystemExit()))
    with pytest.raises(SystemExit):
        commit(job_of(run, 1, image), step_hook=failing_at("fsync-parent", SystemExit()))
    assert os.listdir(run) == []


@pytest.mark.parametrize("file", [ADAPTER, "README.md", "async_ckpt.json"])
def test_a_failed_fsync_of_a_file_is_not_tried_again(
    run: Path, image: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fdatasync, failed = os.fdatasync, []

    def fail_once(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.endswith(file):
            failed.append(path)
            if len(failed) == 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", fail_once)
    with pytest.raises(CommitError) as caught:
        commit(job_of(run, 1, image))
    assert caught.value.errno == errno.EIO
    assert len(failed) == 1
    assert os.listdir(run) == []
    commit(job_of(run, 1, image))
    # Written anew, under another name: nothing of the distrusted file is in it.
    assert len(failed) == 2
    assert failed[0] != failed[1]


def test_a_withdrawal_that_fails_too_is_said(run: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename_new = filesystem.rename_new

    def refuse_back(source: str, destination: str) -> None:
        if destination.endswith(".tmp"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        rename_new(source, destination)

    monkeypatch.setattr("async_ckpt_saver.writer.rename_new", refuse_back)
    with pytest.raises(CommitError, match="could not be withdrawn"):
        commit(job_of(run, 1, image), step_hook=failing_at("fsync-parent", OSError(errno.EIO, "broken")))
    assert_whole(run / "checkpoint-1", image)


def test_a_filesystem_without_directory_fsync_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int) -> None:
        raise OSError(errno.EINVAL, "unsupported")

    monkeypatch.setattr(os, "fsync", unsupported)
    filesystem.fsync_directory(tmp_path)


def test_a_new_directory_whose_name_cannot_be_synced_is_made_again(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left there, the next commit would take its name for durable."""
    fsync, failed, synced = os.fsync, [], []

    def fail_once(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path == str(tmp_path) and not failed:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)
        synced.append(path)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(CommitError, match="Input/output error"):
        commit(job_of(tmp_path / "run", 1, image))
    assert not (tmp_path / "run").exists()
    commit(job_of(tmp_path / "run", 2, image))
    assert synced[0] == str(tmp_path)


@pytest.mark.parametrize("point", BEFORE_DURABLE[1:-1])
def test_a_directory_that_is_removed_during_a_commit_fails_it(run: Path, image: Path, point: str) -> None:
    """The files before that moment are gone: what is written after it must not be published."""
    with pytest.raises(CommitError, match="No such file or directory"):
        commit(job_of(run, 1, image), step_hook=lambda name: shutil.rmtree(run) if name == point else None)
    assert not run.exists()
    commit(job_of(run, 2, image))
    assert assert_consistent(run, image) == [2]


@pytest.mark.parametrize("name", [ADAPTER, STATE, "README.md"])
def test_a_file_that_is_removed_or_cut_before_the_rename_fails_the_commit(run: Path, image: Path, name: str) -> None:
    for step, damage in enumerate((os.unlink, lambda path: os.truncate(path, 1)), 1):

        def step_hook(point: str, step: int = step, damage: Callable[[str], None] = damage) -> None:
            if point == "rename":
                damage(f"{run}/.checkpoint-{step}.n.tmp/{name}")

        with pytest.raises(CommitError, match=r"No such file|changed by another program"):
            commit(job_of(run, step, image), nonce="n", step_hook=step_hook)
        assert os.listdir(run) == []


def test_a_directory_that_is_gone_when_its_name_cannot_be_synced_needs_no_withdrawal(run: Path, image: Path) -> None:
    with pytest.raises(CommitError, match="No such file or directory") as caught:
        commit(job_of(run, 1, image), step_hook=lambda name: shutil.rmtree(run) if name == "fsync-parent" else None)
    assert "withdrawn" not in caught.value.reason
    assert not run.exists()


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "keep_last"), (errno.EDQUOT, "quota"), (errno.EROFS, "remount,rw"), (errno.EIO, "dmesg")],
)
def test_an_error_of_the_disk_says_what_to_do(run: Path, image: Path, code: int, advice: str) -> None:
    with pytest.raises(CommitError, match=advice) as caught:
        commit(job_of(run, 1, image), step_hook=failing_at("manifest", OSError(code, os.strerror(code))))
    assert "the next save tries again" in caught.value.reason
