"""Ray Train, the real one, on two workers: checkpoints by us, where Ray expects its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_ckpt import latest
from tests.integrations.ray_job import KILL, STEPS
from tests.ranks import ROOT
from tests.system.processes import environment, until
from tests.system.test_demo import make_tiny_model
from tests.system.training import check_checkpoint, kept

pytest.importorskip("ray")


def ray_environment(folder: Path) -> dict[str, str]:
    """Ray's variables of this machine are not meant for a test's own cluster."""
    mine = {name: value for name, value in environment().items() if not name.startswith("RAY_")}
    return mine | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder / "r"), "RAY_DEDUP_LOGS": "0"}


def processes_of(folder: Path) -> list[int]:
    """What belongs to the cluster of this test, found by its folder in command line or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder / "r") in told:
            found.append(int(process.name))
    return found


@pytest.fixture(autouse=True)
def _no_cluster_left(folder: Path) -> Iterator[None]:
    yield
    until(lambda: not processes_of(folder), "every process of Ray is gone", 30.0)


def run(folder: Path, *command: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ray_environment(folder) | variables, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.full
def test_a_killed_worker_and_rays_restart(folder: Path) -> None:
    """Ray starts both workers again, and they go on from the save that one of them did not outlive by a step."""
    run(folder, "-m", "tests.integrations.ray_job", str(folder))
    lives = [[json.loads(line) for line in (folder / f"lives-{rank}").read_text().splitlines()] for rank in (0, 1)]
    assert [[life.get("step") for life in each] for each in lives] == [[None, KILL], [None, KILL]]
    assert {each[1]["source"] for each in lives} in ({"ram"}, {"disk"})
    assert len({life["pid"] for each in lives for life in each}) == 4
    result = json.loads((folder / "result.json").read_text())
    assert result["error"] == "None"
    assert result["checkpoint"] == str(folder / "run" / f"checkpoint-{STEPS}")
    assert result["metrics"] == {"step": STEPS}
    names = [f"checkpoint-{number}" for number in (STEPS - 1, STEPS)]
    assert [Path(path).name for path in result["best"]] == names
    # Ray removes what it was told of: never step 4, and others only if it heard of them before the kill.
    found = {int(path.name.removeprefix("checkpoint-")) for path in (folder / "run").glob("checkpoint-*")}
    assert {KILL, STEPS - 1, STEPS} <= found
    assert latest(folder / "run") == folder / "run" / names[-1]
    for number in (KILL, STEPS - 1, STEPS):
        check_checkpoint(folder / "run" / f"checkpoint-{number}", kept(folder / "expected" / str(number)), number)


@pytest.mark.full
def test_the_example_goes_on(folder: Path) -> None:
    make_tiny_model(folder / "model")
    for _ in range(2):
        printed = run(folder, str(ROOT / "examples" / "ray_train.py"), str(folder / "run"),
                      FINETUNE_MODEL=str(folder / "model"))  # fmt: skip
        assert f"newest: {folder}/run/checkpoint-12; " in printed
    found = sorted(path.name for path in (folder / "run").glob("checkpoint-*") if path.is_dir())
    assert found == ["checkpoint-10", "checkpoint-12", "checkpoint-8"]
