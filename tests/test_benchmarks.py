"""The benchmarks still run, and judge as they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.big_jobs import big_jobs
from benchmarks.goals import Verdict
from benchmarks.report import put_between, render

HOME = Path(__file__).resolve().parent.parent


def test_a_goal_is_met_up_to_its_limit() -> None:
    assert Verdict("save call", 0.02, 0.02, "x", "").met
    missed = Verdict("save call", 0.021, 0.02, "x", "1 ms / 48 ms")
    assert not missed.met
    assert str(missed) == "MISSED    0.021x   (goal 0.02x)  save call: 1 ms / 48 ms"


def test_the_pages_show_the_last_run() -> None:
    """`python -m benchmarks.report` puts there what `make bench` has left in benchmarks/results."""
    run = json.loads((HOME / "benchmarks" / "results" / "bench.json").read_text())
    assert render(run) in (HOME / "docs" / "benchmarks.md").read_text()
    rows = json.loads((HOME / "benchmarks" / "results" / "scale.json").read_text())["rows"]
    assert big_jobs(run, rows) in (HOME / "docs" / "scale.md").read_text()


def test_text_is_put_between_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n")
    for _ in range(2):
        put_between(page, "x", "new")
    assert page.read_text() == "a\n<!-- begin: x -->\nnew\n<!-- end: x -->\nb\n"


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_whole_benchmark_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch_checkpointing", reason="needs the extra [bench]")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--folder", str(tmp_path), "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "bench.json").read_text())
    assert set(run["shapes"]) == {"560", "2240"}
    assert len(run["shapes"]["560"]["ways"]) == 10
    assert all(len(way["saves"]) == 2 for way in run["shapes"]["560"]["ways"].values())
    assert "goals: " in done.stdout
    assert "GPU: " in done.stdout
    assert (tmp_path / "bench.svg").read_text().startswith("<svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.svg", "bench.txt"]
