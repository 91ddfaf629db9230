"""What killed savers left goes, and nothing else."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt_saver.writer import CommitError, commit, sweep
from tests.saver.committing import assert_whole, failing_at, hidden, job_of


@pytest.mark.parametrize("nonce", ["", "a/b", "..", "a.b", "x" * 65, "a b"])
def test_a_nonce_that_sweep_would_not_recognise_is_refused(run: Path, image: Path, nonce: str) -> None:
    with pytest.raises(CommitError, match="nonce"):
        commit(job_of(run, 1, image), nonce=nonce)


def test_sweep_removes_what_killed_savers_left_and_nothing_else(
    run: Path, image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit(job_of(run, 1, image))
    (tmp_path / "elsewhere").mkdir()
    for name in (".checkpoint-5.abc.tmp", ".checkpoint-7.x-_9.trash"):
        (run / name / "sub").mkdir(parents=True)
        (run / name / "sub" / "f").write_bytes(b"f")
        os.symlink(tmp_path / "elsewhere", run / name / "link")
    os.symlink("checkpoint-5", run / ".latest.abc.tmp")
    os.symlink("checkpoint-0", run / "gone")
    os.replace(run / "gone", run / "latest")
    foreign = [".checkpoint-5.tmp", ".checkpoint-x.abc.tmp", "checkpoint-5.abc.tmp", ".checkpoint-5.abc.tmp.bak",
               ".checkpoint-5.a.b.tmp", "x.checkpoint-5.abc.tmp", "checkpoint-2", "other"]  # fmt: skip
    for name in foreign:
        (run / name).mkdir()
    (run / ".probe.abc.tmp").touch()
    (run / ".checkpoint-6.abc.tmp").write_bytes(b"a file with such a name is not ours")
    os.symlink(tmp_path / "elsewhere", run / ".checkpoint-8.abc.tmp")
    removed = sweep(run)
    assert sorted(removed) == [".checkpoint-5.abc.tmp", ".checkpoint-7.x-_9.trash", ".latest.abc.tmp", ".probe.abc.tmp"]
    expected = [*foreign, "checkpoint-1", "latest", ".checkpoint-6.abc.tmp", ".checkpoint-8.abc.tmp"]
    assert sorted(os.listdir(run)) == sorted(expected)
    assert (tmp_path / "elsewhere").is_dir()
    assert os.readlink(run / "latest") == "checkpoint-1"
    assert sweep(run) == []
    assert caplog.records == []


def test_sweep_leaves_a_commit_of_this_process_alone(run: Path, image: Path) -> None:
    swept: list[str] = []
    commit(job_of(run, 1, image), step_hook=lambda name: swept.extend(sweep(run)) if run.exists() else None)
    assert swept == []
    assert_whole(run / "checkpoint-1", image)


def test_sweep_makes_a_name_durable_that_a_killed_saver_gave(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(job_of(run, 1, image))
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    sweep(run)
    assert synced == [str(run)]


def test_sweep_of_nothing_and_of_what_cannot_be_synced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep(run) == []
    assert not run.exists()

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="broken"):
        sweep(tmp_path)


def test_what_could_not_be_removed_goes_with_the_next_commit(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filesystem that has failed does not take removals either."""

    def refuse(path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(CommitError, match="Read-only"):
            commit(job_of(run, 1, image), step_hook=failing_at("manifest", OSError(errno.EROFS, "Read-only")))
        assert len(hidden(run)) == 1
    other = run / ".checkpoint-9.abc.tmp"  # another saver's, or a killed one's: not ours to remove here
    other.mkdir()
    commit(job_of(run, 2, image))
    assert hidden(run) == [other.name]
