"""`latest`: always at the newest valid checkpoint, never back, and never in place of what is not ours."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from async_ckpt_saver.latest_link import point_latest
from async_ckpt_saver.writer import CommitResult, commit
from tests.saver.committing import assert_consistent, assert_whole, job_of


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


def test_point_latest_without_a_checkpoint_makes_no_link(tmp_path: Path) -> None:
    assert point_latest(tmp_path)
    assert os.listdir(tmp_path) == []
