"""What an operator sees on a terminal, of a saver at work and of long commands, and what a log gets instead."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.saver.checkpoints import adapter, commit_checkpoint
from tests.system.processes import Daemon, Job, environment, until
from tests.system.terminal import ENTERS_ALTERNATE_SCREEN, LEAVES_ALTERNATE_SCREEN, Terminal
from tests.system.training import adamw, attach, reached, step, wrapped

_HERE = "tests.system.test_terminal"


def saves_when_told(folder: str, endpoint: str) -> None:
    """Two steps are committed, and a third at the test's word."""
    model = wrapped("fsdp2")
    optimizer = adamw(model)
    with attach(model, optimizer, directory=Path(folder, "run"), saver=endpoint, timeout_s=60) as ckpt:
        for number in (1, 2):
            step(model, optimizer)
            ckpt.save(number).wait()
        reached(folder, "two")
        until(Path(folder, "third").exists, "the test's word")
        step(model, optimizer)
        ckpt.save(3).wait()
        until(Path(folder, "go").exists, "the test's word")


def rows(screen: str) -> list[tuple[int, str]]:
    """Step and outcome of each save in the table."""
    return [(int(step), outcome) for step, outcome in re.findall(r"^ +(\d+)  .* (\w+)$", screen, re.MULTILINE)]


def test_status_watch_on_a_terminal(folder: Path) -> None:
    with Daemon(folder / "d", folder) as daemon, Job(f"{_HERE}:saves_when_told", 2, folder, daemon.endpoint) as job:
        job.reach("two")
        watch = ("status", "--watch", "--bind", daemon.endpoint)
        with Terminal(*watch, columns=80, lines=20) as terminal, Terminal(*watch, columns=80, lines=20) as other:
            first = terminal.see(lambda screen: "Ctrl-C" in screen, "the whole of it")
            lines = first.splitlines()
            assert lines[0] == f"saver {daemon.process.pid} at {daemon.endpoint}"
            assert f"{folder}/run  live, job " in first
            assert f"  ranks 0 (pid {job.pids[0]}), 1 (pid {job.pids[1]})" in lines
            assert rows(first) == [(2, "committed"), (1, "committed")]
            assert re.search(r"^  step +age +stage +copy +write +commit +size  outcome$", first, re.MULTILINE)
            size_bytes = sum(
                entry["bytes"]
                for entry in json.loads((folder / "run/checkpoint-2/async_ckpt.json").read_text())["files"].values()
            )
            assert f"{size_bytes / 1000:.1f} kB  committed" in first

            (folder / "third").touch()
            updated = terminal.see(lambda screen: len(rows(screen)) == 3, "the third save")
            assert rows(updated)[0] == (3, "committed")
            assert "  3 committed, " in updated
            assert updated.count("saver ") == first.count("saver ")  # drawn in place, not below

            terminal.press(b"\x03")
            assert terminal.ended() == 0
            assert b"Traceback" not in terminal.written
            assert (
                terminal.written.count(ENTERS_ALTERNATE_SCREEN) == terminal.written.count(LEAVES_ALTERNATE_SCREEN) == 1
            )
            assert terminal.modes_kept
            assert not terminal.cursor_hidden

            assert daemon.process.poll() is None
            other.see(lambda screen: len(rows(screen)) == 3, "the third save")
            (folder / "go").touch()
            job.wait()
            assert daemon.stop() == -signal.SIGTERM
            assert other.ended() == 1
            after = other.written.rpartition(LEAVES_ALTERNATE_SCREEN)[2].decode()
            assert "async-ckpt-saver status: " in after
            assert daemon.endpoint in after.replace("\r\n", "")
            assert not other.cursor_hidden


def test_a_log_gets_plain_lines(folder: Path) -> None:
    with Daemon(folder / "d", folder) as daemon:
        command = [sys.executable, "-m", "async_ckpt_saver", "status", "--watch", "--bind", daemon.endpoint]
        log = folder / "log"
        with log.open("wb") as file, subprocess.Popen(command, env=environment(), stdout=file, stderr=file) as watching:
            try:
                until(lambda: log.read_text().count("\nno runs\n") >= 2, "two reports in the log")
                watching.send_signal(signal.SIGINT)
                assert watching.wait(30) == 0
            finally:
                watching.kill()
    assert "\x1b" not in log.read_text()
    assert "Traceback" not in log.read_text()


def _directory(folder: Path) -> Path:
    for number in (1, 2, 3):
        commit_checkpoint(folder / "run", number, folder, tensors=adapter(number, large_elements=4 << 20))
    return folder / "run"


def test_verify_has_a_bar_on_a_terminal_and_none_in_a_log(folder: Path) -> None:
    run = _directory(folder)
    with Terminal("verify", run) as terminal:
        assert terminal.ended() == 0
        assert [line.split()[0] for line in terminal.shown.splitlines()] == ["ok", "ok", "ok"]  # the bar is gone
        drawn = terminal.written.decode()
        assert "\x1b[?25l" in drawn
        assert re.search(r"verify\W.*\d+(\.\d+)?/\d+(\.\d+)? MB", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", drawn))
        assert not terminal.cursor_hidden
        assert terminal.modes_kept
    command = [sys.executable, "-m", "async_ckpt_saver", "verify", str(run)]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout.count(b"\n")) == (0, b"", 3)
    assert b"\x1b" not in done.stdout


def test_what_verify_says_goes_where_it_is_sent_while_the_bar_is_on_the_terminal(folder: Path) -> None:
    run = _directory(folder)
    report = folder / "report"
    with report.open("wb") as file, Terminal("verify", run, stdout=file) as terminal:
        assert terminal.ended() == 0
        assert b"\x1b[?25l" in terminal.written
    assert [line.split()[:2] for line in report.read_text().splitlines()] == [
        ["ok", f"{run}/checkpoint-{number}"] for number in (1, 2, 3)
    ]


def test_gc_says_each_removal_as_it_happens(folder: Path) -> None:
    run = _directory(folder)
    with Terminal("gc", run, "--keep-last", 1) as terminal:
        assert terminal.ended() == 0
        lines = terminal.shown.splitlines()
    assert [line.split()[-1] for line in lines[:2]] == ["removed", "removed"]
    assert lines[2].startswith("2 removed, ")
    assert sorted(os.listdir(run)) == ["checkpoint-3", "latest"]
