from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.holding import reading
from async_ckpt.core.manifest import committed
from async_ckpt.core.retention_policy import Policy
from async_ckpt_saver import exit_codes
from async_ckpt_saver.cli import main
from async_ckpt_saver.collection import IS_NEW, NOT_MOVED, Removal, collect
from async_ckpt_saver.temporaries import held
from tests.saver.checkpoints import commit_checkpoint

NOTHING = Policy()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3, 4):
        commit_checkpoint(tmp_path / "run", step, tmp_path)
    return tmp_path / "run"


def steps(directory: Path) -> list[int]:
    return [step for step, _ in committed(directory)]


def leave(directory: Path, name: str) -> Path:
    """As a saver leaves it that was killed while it wrote."""
    path = directory / name
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(b"half")
    return path


def collected(directory: Path, policy: Policy, *, dry_run: bool = False) -> list[tuple[str, bool, str]]:
    return [(each.name, each.done, each.reason) for each in collect(directory, policy, dry_run=dry_run)]


def test_what_a_killed_saver_left_goes_and_nothing_else(run: Path) -> None:
    leave(run, ".checkpoint-5.abc.tmp")
    leave(run, ".checkpoint-1.abc.trash")
    for name in ("notes", ".checkpoint-x.abc.tmp", "checkpoint-9"):
        leave(run, name)
    (run / ".checkpoint-6.abc.tmp").write_text("a file")
    before = set(os.listdir(run))
    assert sorted(collected(run, NOTHING)) == [
        (".checkpoint-1.abc.trash", True, ""), (".checkpoint-5.abc.tmp", True, ""),
    ]  # fmt: skip
    assert set(os.listdir(run)) == before - {".checkpoint-5.abc.tmp", ".checkpoint-1.abc.trash"}
    assert collected(run, NOTHING) == []


def test_what_a_saver_works_under_stays(run: Path) -> None:
    """Of this process or another; and what one may have made an instant ago, and not yet locked."""
    mine, theirs = leave(run, ".checkpoint-5.mine.tmp"), leave(run, ".checkpoint-6.theirs.tmp")
    (run / ".checkpoint-7.new.tmp").mkdir()
    (run / ".latest.new.tmp").symlink_to("checkpoint-4")
    code = (
        "import sys; from async_ckpt_saver.temporaries import held\nwith held(sys.argv[1]): print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(theirs)]
    with held(str(mine)), subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        new = [(".checkpoint-7.new.tmp", False, IS_NEW), (".latest.new.tmp", False, IS_NEW)]
        assert sorted(collected(run, NOTHING)) == new
        other.kill()
        other.wait()
        assert sorted(collected(run, NOTHING)) == [(".checkpoint-6.theirs.tmp", True, ""), *new]
    assert sorted(collected(run, NOTHING)) == [(".checkpoint-5.mine.tmp", True, ""), *new]


def test_a_rehearsal_says_the_same_and_changes_nothing(run: Path) -> None:
    leave(run, ".checkpoint-5.abc.tmp")
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    rehearsed = collect(run, Policy(keep_last=2), dry_run=True)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
    assert [(each.name, each.done) for each in rehearsed] == [
        (".checkpoint-5.abc.tmp", False), ("checkpoint-1", False), ("checkpoint-2", False),
    ]  # fmt: skip
    done = collect(run, Policy(keep_last=2), dry_run=False)
    assert [(each.name, each.bytes, each.kind) for each in done] == [
        (each.name, each.bytes, each.kind) for each in rehearsed
    ]
    assert all(each.done for each in done)
    assert steps(run) == [3, 4]


def test_the_newest_and_what_we_did_not_write_stay(run: Path) -> None:
    (run / "checkpoint-2" / "async_ckpt.json").unlink()
    leave(run, "checkpoint-7")
    told: list[Removal] = []
    collect(run, Policy(keep_best=("loss", "max", 1)), dry_run=False, progress=told.append)
    assert [each.name for each in told] == ["checkpoint-3"]
    assert steps(run) == [1, 4]
    assert {"checkpoint-2", "checkpoint-7"} <= set(os.listdir(run))
    assert os.readlink(run / "latest") == "checkpoint-4"


def test_what_is_read_stays_until_it_is_not(run: Path) -> None:
    with reading(run / "checkpoint-1"):
        assert collected(run, Policy(keep_last=1), dry_run=True)[0] == ("checkpoint-1", False, "is being read")
        assert collected(run, Policy(keep_last=1)) == [
            ("checkpoint-1", False, "is being read"), ("checkpoint-2", True, ""), ("checkpoint-3", True, ""),
        ]  # fmt: skip
        assert steps(run) == [1, 4]
    assert collected(run, Policy(keep_last=1)) == [("checkpoint-1", True, "")]


def test_it_looks_at_the_lock_of_the_kernel(run: Path) -> None:
    """Any process may protect a checkpoint so, a shell script as well: flock -s checkpoint-1/async_ckpt.json."""
    with (run / "checkpoint-1" / "async_ckpt.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert collected(run, Policy(keep_last=3)) == [("checkpoint-1", False, "is being read")]


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        collect(tmp_path / "none", NOTHING, dry_run=True)


def test_a_latest_that_cannot_be_moved_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever reads by the link would go on with what has been removed."""
    (run / "latest").unlink()
    (run / "latest").mkdir()
    assert [each for each in collected(run, NOTHING) if each[0] == "latest"] == [("latest", False, NOT_MOVED)]
    assert [each for each in collected(run, NOTHING, dry_run=True) if each[0] == "latest"] == []
    assert main(["gc", str(run), "--keep-last", "1"]) == exit_codes.ERROR
    assert f"latest  0 B  stays: {NOT_MOVED}" in capsys.readouterr().out
    assert steps(run) == [4]
    (run / "latest").rmdir()
    assert main(["gc", str(run)]) == exit_codes.OK
    assert os.readlink(run / "latest") == "checkpoint-4"
