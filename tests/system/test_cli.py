"""The command line as an operator uses it: on savers at work, and on what real jobs have committed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import async_ckpt
from async_ckpt import restoring
from tests.ranks import ROOT
from tests.system.processes import Daemon, Job, Scenario, environment, run_together, runs_of, savers, until
from tests.system.training import adamw, attach, reached, step, wrapped

_HERE = "tests.system.test_cli"


def cli(*words: object, status: int = 0, env: dict[str, str] | None = None) -> str:
    """What it prints; asserts its exit status."""
    command = [sys.executable, "-m", "async_ckpt_saver", *map(str, words)]
    done = subprocess.run(command, env=environment() | (env or {}), capture_output=True, text=True, timeout=60)
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def status(*words: object) -> dict:  # type: ignore[type-arg]
    found: dict = json.loads(cli("status", "--json", *words))  # type: ignore[type-arg]
    return found


def three_saves(folder: str, endpoint: str) -> None:
    """Two steps are committed, then the ranks wait for the test's word."""
    model = wrapped("fsdp2")
    optimizer = adamw(model)
    ckpt = attach(model, optimizer, directory=Path(folder, "run"), saver=endpoint or None, timeout_s=60)
    for number in (1, 2):
        step(model, optimizer)
        ckpt.save(number, metrics={"loss": 1 / number}).wait()
    reached(folder, "committed")
    until(Path(folder, "go").exists, "the test's word")
    ckpt.close()


def paused_restore(folder: str) -> None:
    """Restores step 1, and holds on in the middle of it."""
    model = wrapped("plain")
    opened = restoring.OpenCheckpoint.read

    def pausing(self: restoring.OpenCheckpoint) -> None:
        opened(self)
        reached(folder, "reading")
        until(Path(folder, "go").exists, "the test's word")

    restoring.OpenCheckpoint.read = pausing  # type: ignore[method-assign]
    with attach(model, directory=Path(folder, "run"), timeout_s=60) as ckpt:
        restored = ckpt.restore(1)
        assert restored is not None
        assert restored.step == 1


def status_of_a_daemon(folder: Path) -> None:
    with Daemon(folder / "d", folder) as daemon:
        asked = ("--bind", daemon.endpoint)
        assert status(*asked)["runs"] == []
        with Job(f"{_HERE}:three_saves", 2, folder, daemon.endpoint) as job:
            job.reach("committed")
            found = status(*asked)
            [run] = found["runs"]
            assert (found["pid"], found["endpoint"], found["root"]) == (
                daemon.process.pid, daemon.endpoint, str(folder.resolve()),
            )  # fmt: skip
            assert found["rss_bytes"] > 1 << 20
            assert (run["directory"], run["state"], run["world"]) == (str(folder / "run"), "live", 2)
            assert [(rank["rank"], rank["pid"], rank["alive"]) for rank in run["ranks"]] == [
                (rank, pid, True) for rank, pid in enumerate(job.pids)
            ]
            assert [slot["step"] for slot in run["slots"]] in ([1, 2], [2, 1])
            assert (run["committed"], run["failures"], run["queue"], run["last_error"]) == (2, {}, [], "")
            for number, save in zip((1, 2), run["saves"], strict=True):
                files = json.loads((folder / f"run/checkpoint-{number}/async_ckpt.json").read_text())["files"]
                assert save["bytes"] == sum(entry["bytes"] for entry in files.values()) > 0
                assert (save["step"], save["outcome"], save["cause"]) == (number, "committed", "")
                assert [each["rank"] for each in save["staged"]] == [0, 1]
                assert all(each["copy_s"] > 0 for each in save["staged"])
                assert save["started_unix_s"] <= save["write_started_unix_s"] <= save["settled_unix_s"]
            printed = cli("status", env={"ASYNC_CKPT_BIND": daemon.endpoint})
            assert f"saver {daemon.process.pid} at {daemon.endpoint}" in printed
            assert "2 committed" in printed
            watching = subprocess.Popen(
                [sys.executable, "-m", "async_ckpt_saver", "status", "--json", "--watch", *asked],
                env=environment(), stdout=subprocess.PIPE, text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
            )  # fmt: skip
            with watching:
                assert watching.stdout is not None
                lines = [json.loads(watching.stdout.readline()) for _ in range(2)]
                assert lines[0]["uptime_s"] < lines[1]["uptime_s"]
                watching.send_signal(signal.SIGINT)
                assert watching.wait(30) == 0
            (folder / "go").touch()
            job.wait()
        until(lambda: not runs_of(folder), "closed runs are out of shared memory", 30.0)
        found = status(*asked)
        assert found["runs"] == []
        assert [(run["state"], run["committed"]) for run in found["ended"]] == [("ended", 2)]
    assert "no saver listens" in cli("status", *asked, status=1)


def status_of_an_embedded_saver(folder: Path) -> None:
    """Found from the training directory; and what it committed passes every look at it."""
    run = folder / "run"
    with Job(f"{_HERE}:three_saves", 2, folder, "") as job:
        job.reach("committed")
        found = status(run)
        assert [found["pid"]] == savers(run)
        assert found["runs"][0]["committed"] == 2
        (folder / "go").touch()
        job.wait()
    assert cli("verify", run).count("ok  ") == 2
    assert "5" not in cli("diff", run / "checkpoint-1", run / "checkpoint-1").split()
    assert "loss: 1" in cli("diff", run / "checkpoint-1", run / "checkpoint-2", status=5)
    shown = json.loads(cli("show", run, "--json"))
    assert shown["step"] == 2
    assert shown["adapter"]["peft_type"] == "LORA"
    assert shown["training_state"]["optimizers"][0]["class"] == "AdamW"
    [listed, newest] = json.loads(cli("ls", run, "--json"))
    assert (listed["latest"], newest["latest"]) == (False, True)


def what_a_rank_restores_is_not_removed(folder: Path) -> None:
    run = folder / "run"
    with Job(f"{_HERE}:three_saves", 1, folder, "") as job:
        job.reach("committed")
        (folder / "go").touch()
        job.wait()
    (folder / "go").unlink()
    with Job(f"{_HERE}:paused_restore", 1, folder) as job:
        job.reach("reading")
        assert "stays: is being read" in cli("gc", run, "--keep-last", 1)
        assert (run / "checkpoint-1").exists()
        job.kill()
    assert "1 removed" in cli("gc", run, "--keep-last", 1)
    assert async_ckpt.latest(run) == run / "checkpoint-2"
    assert sorted(os.listdir(run)) == ["checkpoint-2", "latest"]


def settings_from_file_and_environment(folder: Path) -> None:
    """The saver takes what `config` shows."""
    folder.mkdir()
    file = folder / "saver.toml"
    endpoint = f"ipc://{folder}/d/saver.sock"
    file.write_text(f'root = "{folder}"\nkeep_image_s = 1\n')
    env = {"ASYNC_CKPT_CONFIG": str(file), "ASYNC_CKPT_KEEP_IMAGE_S": "2"}
    shown = json.loads(cli("config", "--bind", endpoint, "--json", env=env))
    assert [(shown[name]["value"], shown[name]["source"]) for name in ("bind", "root", "keep_image_s")] == [
        (endpoint, "flag"), (str(folder), "file"), (2.0, "environment"),
    ]  # fmt: skip
    command = [sys.executable, "-m", "async_ckpt_saver", "run", "--bind", endpoint]
    with subprocess.Popen(command, env=environment() | env, stderr=subprocess.DEVNULL) as saver:
        until((folder / "d" / "saver.sock").exists, "the saver's socket")
        assert status("--bind", endpoint)["root"] == str(folder)
        assert "belongs to another saver" in cli("run", "--bind", endpoint, "--root", folder, status=3)
        assert f"is served by pid {saver.pid}" in cli("doctor", "--bind", endpoint, "--root", folder)
        saver.terminate()


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        status_of_a_daemon,
        status_of_an_embedded_saver,
        what_a_rank_restores_is_not_removed,
        settings_from_file_and_environment,
    )
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_cli(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected}
        results.update(run_together(chosen, folder, at_once=4))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)


def test_a_pipe_that_is_closed_early_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} -m async_ckpt_saver completion bash | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
