"""Jobs that cannot be done as they are asked, and names that are taken: an error, and nothing is changed."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from async_ckpt_saver import filesystem
from async_ckpt_saver.writer import AlreadyCommittedError, CommitError, commit
from tests.saver.committing import ADAPTER, assert_consistent, assert_whole, hidden, job_of


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


def test_a_run_directory_that_is_a_file_is_an_error(run: Path, image: Path) -> None:
    run.write_bytes(b"")
    with pytest.raises(CommitError, match=r"File exists|Not a directory"):
        commit(job_of(run / "deeper", 1, image))
    assert run.read_bytes() == b""
