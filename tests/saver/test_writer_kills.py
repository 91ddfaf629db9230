"""A saver that is killed by SIGKILL, anywhere: the directory holds the whole checkpoint or nothing of that name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from async_ckpt_saver.writer import AlreadyCommittedError, commit, sweep
from tests.saver import committing
from tests.saver.committing import assert_consistent, assert_whole, hidden, job_of, make_image

POINTS = [
    "mkdir",
    "write:adapter_model.safetensors",
    "chunk:adapter_model.safetensors",
    "chunk:adapter_model.safetensors",
    "chunk:adapter_model.safetensors",
    "fsync:adapter_model.safetensors",
    "write:training_state/training_state.safetensors",
    "chunk:training_state/training_state.safetensors",
    "chunk:training_state/training_state.safetensors",
    "fsync:training_state/training_state.safetensors",
    "write:adapter_config.json",
    "fsync:adapter_config.json",
    "write:training_state/training_state.json",
    "fsync:training_state/training_state.json",
    "write:README.md",
    "fsync:README.md",
    "manifest",
    "fsync:async_ckpt.json",
    "fsync-directory:training_state",
    "fsync-directory:.",
    "rename",
    "fsync-parent",
    "latest",
    "latest-replace",
    "fsync-latest",
    "done",
]
VISIBLE_FROM = POINTS.index("fsync-parent")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image") / "slot-0")


def saver(directory: Path, step: int, image: Path, kill_at: int) -> subprocess.Popen[bytes]:
    program = [sys.executable, committing.__file__, str(directory), str(step), str(image), str(kill_at)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(program, stdout=subprocess.PIPE, env=environment)


def assert_recovers(directory: Path, image: Path, killed_step: int) -> bool:
    """The next saver finds the directory consistent, cleans it, and commits on. True if the killed commit counts."""
    steps = assert_consistent(directory, image)
    assert set(steps) - {killed_step} == {10}
    sweep(directory)
    assert hidden(directory) == []
    assert assert_consistent(directory, image) == steps
    assert os.readlink(directory / "latest") == f"checkpoint-{steps[-1]}"
    if killed_step in steps:
        with pytest.raises(AlreadyCommittedError):
            commit(job_of(directory, killed_step, image))
    else:
        commit(job_of(directory, killed_step, image))
    commit(job_of(directory, 30, image))
    assert assert_consistent(directory, image) == [10, killed_step, 30]
    assert os.readlink(directory / "latest") == "checkpoint-30"
    return killed_step in steps


def test_the_points_are_these(tmp_path: Path, image: Path) -> None:
    with saver(tmp_path / "run", 20, image, -1) as process:
        assert process.communicate()[0].decode().splitlines() == POINTS
    assert process.returncode == 0
    assert_whole(tmp_path / "run" / "checkpoint-20", image)


@pytest.mark.parametrize("kill_at", range(len(POINTS)), ids=lambda kill_at: f"{kill_at}-{POINTS[kill_at]}")
def test_killed_at_a_point(tmp_path: Path, image: Path, kill_at: int) -> None:
    commit(job_of(tmp_path, 10, image))
    with saver(tmp_path, 20, image, kill_at) as process:
        assert process.communicate()[0].decode().splitlines() == POINTS[: kill_at + 1]
    assert process.returncode == -9
    assert assert_recovers(tmp_path, image, 20) == (kill_at >= VISIBLE_FROM)


@pytest.mark.parametrize("seen", range(1, len(POINTS), 2), ids=lambda seen: f"{seen}-{POINTS[seen - 1]}")
def test_killed_from_outside_somewhere_after_a_point(tmp_path: Path, image: Path, seen: int) -> None:
    """The kill lands inside whatever system call comes next, not neatly before it."""
    commit(job_of(tmp_path, 10, image))
    with saver(tmp_path, 20, image, -1) as process:
        assert process.stdout is not None
        for _ in range(seen):
            process.stdout.readline()
        process.kill()
    assert_recovers(tmp_path, image, 20)
