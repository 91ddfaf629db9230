"""examples/trainer.py under torchrun, with a tiny model in SmolLM2's place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from async_ckpt import latest
from tests.ranks import ROOT
from tests.system.processes import environment
from tests.system.test_demo import make_tiny_model


def steps_logged(checkpoint: Path) -> list[int]:
    state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    return [entry["step"] for entry in state["log_history"] if "loss" in entry]


def test_the_trainer_example_goes_on(folder: Path) -> None:
    make_tiny_model(folder / "model")
    run = folder / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "examples" / "trainer.py"), str(run)]  # fmt: skip
    variables = environment() | {"FINETUNE_MODEL": str(folder / "model")}
    for _ in range(2):
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
        assert latest(run) == run / "checkpoint-12"
        assert steps_logged(run / "checkpoint-12") == [4, 8, 12]
        shutil.rmtree(run / "checkpoint-12")  # so that the second time there is something to go on with
    assert len(AutoTokenizer.from_pretrained(run / "checkpoint-8")) == 256
    assert len((ROOT / "examples" / "trainer.py").read_text().splitlines()) <= 65
