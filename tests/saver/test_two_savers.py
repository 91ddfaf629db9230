"""Two savers at work in one directory, as when a daemon and an embedded saver serve one run after another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from async_ckpt_saver import temporaries
from async_ckpt_saver.temporaries import remove_leftover
from async_ckpt_saver.writer import commit
from tests.ranks import ROOT
from tests.saver.committing import assert_consistent, job_of, make_image


def other_saver(directory: Path, verb: str) -> None:
    """`sweep` or `gc`, in another process, until it is done."""
    code = f"import sys; from async_ckpt_saver.writer import sweep; sweep({str(directory)!r})"
    if verb == "gc":
        code = f"from async_ckpt_saver.cli import main; main(['gc', {str(directory)!r}])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "service")])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True, timeout=60)


def after(function: str, directory: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the other saver work right after `os.<function>` made or opened the temporary directory, three times at most.
    Returns the names at which it did."""
    names: list[str] = []
    original: Callable[..., object] = getattr(os, function)

    def called(path: str, *rest: object, **more: object) -> object:
        result = original(path, *rest, **more)
        if str(path).endswith(".tmp") and ".checkpoint-" in str(path) and len(names) < 3 and not more.get("dir_fd"):
            names.append(os.path.basename(path))
            other_saver(directory, verb)
        return result

    monkeypatch.setattr(os, function, called)
    return names


@pytest.mark.parametrize("verb", ["sweep", "gc"])
@pytest.mark.parametrize("function", ["mkdir", "open"])
def test_a_sweep_before_the_lock_costs_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, verb: str
) -> None:
    run, image = tmp_path / "run", make_image(tmp_path / "image", adapter_bytes=5000)
    run.mkdir()
    names = after(function, run, verb, monkeypatch)
    commit(job_of(run, 1, image))
    assert 1 <= len(names) <= 3
    assert assert_consistent(run, image) == [1]
    assert sorted(os.listdir(run)) == ["checkpoint-1", "latest"]


def test_one_that_loses_its_directory_again_and_again_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody removes hidden directories here for good: that is an error, and no endless loop."""
    run, image = tmp_path / "run", make_image(tmp_path / "image", adapter_bytes=5000)
    run.mkdir()
    mkdir, made = os.mkdir, []

    def removed(path: str, *rest: int, **more: int) -> None:
        mkdir(path, *rest, **more)
        if str(path).endswith(".tmp"):
            made.append(path)
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", removed)
    with pytest.raises(Exception, match="somebody removes"):
        commit(job_of(run, 1, image))
    assert len(made) == temporaries.TRIES
    assert os.listdir(run) == []


def test_what_is_held_by_the_time_it_would_be_removed_stays(tmp_path: Path) -> None:
    """It was listed when it was not held yet."""
    path = tmp_path / ".checkpoint-1.abc.tmp"
    path.mkdir()
    with temporaries.held(str(path)):
        assert not remove_leftover(str(path))
        assert path.is_dir()
    assert remove_leftover(str(path))
    assert not path.exists()
    assert not remove_leftover(str(path))
