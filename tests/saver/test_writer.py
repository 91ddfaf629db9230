from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import msgspec
import pytest
from committing import ADAPTER, DOCUMENTS, STATE, assert_consistent, assert_whole, hidden, job_of, make_image

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import latest, read_manifest
from async_ckpt_saver import filesystem
from async_ckpt_saver.latest_link import point_latest
from async_ckpt_saver.writer import AlreadyCommittedError, CommitError, CommitResult, commit, sweep

BEFORE_DURABLE = [
    "mkdir", f"write:{ADAPTER}", f"chunk:{ADAPTER}", f"fsync:{ADAPTER}", f"fsync:{STATE}", "write:README.md",
    "fsync:README.md", "manifest", "fsync:async_ckpt.json", "fsync-directory:training_state", "fsync-directory:.",
    "rename", "fsync-parent",
]  # fmt: skip
AFTER_DURABLE = ["latest", "latest-replace", "fsync-latest", "done"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "image", adapter_bytes=(1 << 20) + 17)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def failing_at(point: str, error: BaseException) -> Callable[[str], None]:
    def step_hook(name: str) -> None:
        if name == point:
            raise error

    return step_hook


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


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["checkpoint", "empty directory", "file", "dangling link"])
def test_what_has_the_final_name_is_never_replaced(run: Path, image: Path, kind: str, late: bool) -> None:
    final = run / "checkpoint-3"

    def occupy() -> None:
        if kind == "checkpoint":
            commit(job_of(run, 3, image))
        elif kind == "empty directory":
            final.mkdir(parents=True)
        elif kind == "file":
            run.mkdir(exist_ok=True)
            final.write_bytes(b"precious")
        else:
            run.mkdir(exist_ok=True)
            final.symlink_to("nowhere")

    if not late:
        occupy()
    inode = None if late else os.lstat(final).st_ino

    def step_hook(name: str) -> None:
        nonlocal inode
        if late and name == "rename":
            occupy()
            inode = os.lstat(final).st_ino

    with pytest.raises(AlreadyCommittedError, match="checkpoint-3 exists"):
        commit(job_of(run, 3, image), step_hook=step_hook)
    assert os.lstat(final).st_ino == inode
    assert hidden(run) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_without_renameat2_nothing_is_replaced_either(
    run: Path, image: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(source: str, destination: str) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filesystem, "_renameat2", unsupported)
    commit(job_of(run, 3, image))
    assert_whole(run / "checkpoint-3", image)
    with pytest.raises(AlreadyCommittedError):
        commit(
            job_of(run, 4, image), step_hook=lambda name: (run / "checkpoint-4").mkdir() if name == "rename" else None
        )
    assert os.listdir(run / "checkpoint-4") == []


def test_of_many_commits_of_one_step_one_wins(run: Path, image: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for step in range(1, 6):
            futures = [pool.submit(commit, job_of(run, step, image)) for _ in range(8)]
            errors = [future.exception() for future in futures]
            assert errors.count(None) == 1
            assert {type(error) for error in errors if error} == {AlreadyCommittedError}
    assert assert_consistent(run, image) == [1, 2, 3, 4, 5]
    assert hidden(run) == []


def test_commits_of_many_steps_at_once_leave_latest_at_the_newest(run: Path, image: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: commit(job_of(run, step, image)), range(1, 33)))
    assert assert_consistent(run, image) == list(range(1, 33))
    assert os.readlink(run / "latest") == "checkpoint-32"


def test_a_commit_that_is_overtaken_does_not_move_latest_back(run: Path, image: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        overtaking: list[Future[CommitResult]] = []

        def step_hook(name: str) -> None:
            if name == "latest":
                # Step 1 has looked for the newest; step 2 now gets all the time it needs, unless it has to wait.
                overtaking.append(pool.submit(commit, job_of(run, 2, image)))
                wait(overtaking, timeout=0.3)

        commit(job_of(run, 1, image), step_hook=step_hook)
        overtaking[0].result()
    assert os.readlink(run / "latest") == "checkpoint-2"


def test_latest_never_moves_back_from_a_valid_checkpoint(run: Path, image: Path) -> None:
    commit(job_of(run, 9, image))
    commit(job_of(run, 5, image))
    assert os.readlink(run / "latest") == "checkpoint-9"
    (run / "checkpoint-9" / "async_ckpt.json").unlink()
    commit(job_of(run, 6, image))
    assert os.readlink(run / "latest") == "checkpoint-6"
    os.unlink(run / "latest")
    os.symlink("checkpoint-5000", run / "latest")
    commit(job_of(run, 3, image))
    assert os.readlink(run / "latest") == "checkpoint-6"


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_latest_that_is_not_ours_is_left_alone(run: Path, image: Path, kind: str) -> None:
    run.mkdir()
    (run / "latest").mkdir() if kind == "directory" else (run / "latest").write_bytes(b"mine")
    assert not commit(job_of(run, 1, image)).latest_moved
    assert not (run / "latest").is_symlink()
    assert_whole(run / "checkpoint-1", image)


@pytest.mark.parametrize("where", ["files", "documents"])
@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../../x", ".", "a//b", "async_ckpt.json", "a\0", "\ud800"]
)
def test_paths_that_lead_out_are_refused(run: Path, image: Path, where: str, path: str) -> None:
    value = (path,) if where == "files" else {path: b"out"}
    job = msgspec.structs.replace(job_of(run, 1, image), **{where: value})
    with pytest.raises(CommitError, match="step 1"):
        commit(job)
    assert not run.exists()


def test_links_and_other_things_in_the_image_are_refused(run: Path, image: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_bytes(b"key")
    os.symlink(tmp_path / "secret", image / "linked")
    os.symlink(tmp_path / "secret" / "key", image / "key")
    os.mkfifo(image / "fifo")
    for path in ("linked/key", "key", "fifo", "training_state", "missing", f"{ADAPTER}/x"):
        with pytest.raises(CommitError, match=path):
            commit(msgspec.structs.replace(job_of(run, 1, image), files=(path,)))
    assert os.listdir(run) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": -1}, "step -1"),
        ({"directory": "relative"}, "absolute"),
        ({"image": "relative"}, "absolute"),
        ({"files": (), "documents": {}}, "without files"),
        ({"files": (ADAPTER, ADAPTER)}, "twice"),
        ({"documents": {ADAPTER: b""}}, "twice"),
        ({"documents": {f"{ADAPTER}/x": b""}}, "exists|Not a directory"),
        ({"extra": {"x": object()}}, "JSON"),
        ({"metrics": {"loss": [1]}}, "metrics"),
    ],
)
def test_impossible_jobs_are_refused_and_leave_nothing(
    run: Path, image: Path, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(CommitError, match=reason) as caught:
        commit(msgspec.structs.replace(job_of(run, 1, image), **changes))
    assert not isinstance(caught.value, AlreadyCommittedError)
    assert not run.exists() or os.listdir(run) == []


@pytest.mark.parametrize("nonce", ["", "a/b", "..", "a.b", "x" * 65, "a b"])
def test_a_nonce_that_sweep_would_not_recognise_is_refused(run: Path, image: Path, nonce: str) -> None:
    with pytest.raises(CommitError, match="nonce"):
        commit(job_of(run, 1, image), nonce=nonce)


def test_a_run_directory_that_is_a_file_is_an_error(run: Path, image: Path) -> None:
    run.write_bytes(b"")
    with pytest.raises(CommitError, match=r"File exists|Not a directory"):
        commit(job_of(run / "deeper", 1, image))
    assert run.read_bytes() == b""


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


def test_a_filesystem_without_directory_fsync_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int) -> None:
        raise OSError(errno.EINVAL, "unsupported")

    monkeypatch.setattr(os, "fsync", unsupported)
    filesystem.fsync_directory(tmp_path)


def test_point_latest_without_a_checkpoint_makes_no_link(tmp_path: Path) -> None:
    assert point_latest(tmp_path)
    assert os.listdir(tmp_path) == []


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


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "keep_last"), (errno.EDQUOT, "quota"), (errno.EROFS, "remount,rw"), (errno.EIO, "dmesg")],
)
def test_an_error_of_the_disk_says_what_to_do(run: Path, image: Path, code: int, advice: str) -> None:
    with pytest.raises(CommitError, match=advice) as caught:
        commit(job_of(run, 1, image), step_hook=failing_at("manifest", OSError(code, os.strerror(code))))
    assert "the next save tries again" in caught.value.reason
