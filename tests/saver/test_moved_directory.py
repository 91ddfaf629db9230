"""A directory that is renamed, removed or replaced under a run: the run goes on at its path, and says so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import committed
from async_ckpt.core.protocol import Bye, Settled, Staged
from async_ckpt.core.retention_policy import Policy
from async_ckpt_saver.local_storage import LocalStorage
from tests.saver.committing import assert_consistent, job_of, make_image
from tests.saver.hub_bench import Bench, scenario, stage


@pytest.mark.parametrize("how", ["renamed", "removed", "replaced"])
def test_the_first_commit_elsewhere_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    run, image = tmp_path / "run", make_image(tmp_path / "image", adapter_bytes=5000)
    storage = LocalStorage(str(run), tmp_path)
    notices = [storage.commit_once(job_of(run, step, image), lambda: True).notice for step in (1, 2)]
    if how == "removed":
        shutil.rmtree(run)
    else:
        run.rename(tmp_path / "moved")
    if how == "replaced":
        run.mkdir()
    notices += [storage.commit_once(job_of(run, step, image), lambda: True).notice for step in (3, 4)]
    assert [bool(notice) for notice in notices] == [False, False, True, False]
    assert notices[2].startswith(f"checkpoint-2, which this run committed before it, is not in {run} any more")
    assert notices[2] in caplog.text
    assert assert_consistent(run, image) == [3, 4]
    if how != "removed":
        assert assert_consistent(tmp_path / "moved", image) == [1, 2]


def test_a_directory_that_is_moved_and_linked_to_is_the_same(tmp_path: Path) -> None:
    run, image = tmp_path / "run", make_image(tmp_path / "image", adapter_bytes=5000)
    storage = LocalStorage(str(run), tmp_path)
    storage.commit_once(job_of(run, 1, image), lambda: True)
    run.rename(tmp_path / "larger")
    os.symlink(tmp_path / "larger", run)
    assert storage.commit_once(job_of(run, 2, image), lambda: True).notice == ""
    assert assert_consistent(tmp_path / "larger", image) == [1, 2]


def test_a_step_that_failed_is_missed_by_nobody(tmp_path: Path) -> None:
    run, image = tmp_path / "run", make_image(tmp_path / "image", adapter_bytes=5000)
    storage = LocalStorage(str(run), tmp_path)
    storage.commit_once(job_of(run, 1, image), lambda: True)
    with pytest.raises(CheckpointError):
        storage.commit_once(job_of(run, 2, image), lambda: False)
    assert storage.commit_once(job_of(run, 3, image), lambda: True).notice == ""
    storage.retain(Policy(keep_last=1))
    assert storage.commit_once(job_of(run, 4, image), lambda: True).notice == ""


@scenario
async def test_ranks_are_told_also_by_the_next_saver(endpoint: str, root: Path) -> None:
    first = Bench(endpoint, root)
    granted = await first.start(root / "run", "A")

    async def reason_of(saver: Bench, step: int) -> str:
        stage(granted, 0, step % 2, step)
        saver.say("A", Staged(seq=step, slot=step % 2, step=step, copy_s=0.1))
        await saver.until(lambda: step in [each.step for each in saver.heard("A", Settled)], "settled")
        (settled,) = [each for each in saver.heard("A", Settled) if each.step == step]
        assert settled.outcome == "committed"
        return settled.reason

    assert await reason_of(first, 1) == ""
    (root / "run").rename(root / "moved")
    assert (await reason_of(first, 2)).startswith("checkpoint-1, which this run committed before it, is not in")
    second = Bench(endpoint, root)
    second.hub.adopt()
    await second.until(lambda: not second.services.tasks, "what lies there is known")
    (root / "run").rename(root / "again")
    assert (await reason_of(second, 3)).startswith("checkpoint-2, which this run committed before it, is not in")
    assert [[step for step, _ in committed(root / name)] for name in ("moved", "again", "run")] == [[1], [2], [3]]
    second.say("A", Bye(seq=4))
    await second.until(second.gone, "everything is gone")
