"""Others read what we write: safetensors and torch.distributed.checkpoint, by the example that shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from examples.read_elsewhere import by_dcp, compare

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Laid out as ours are; that ours are, the system tests show."""
    path = tmp_path / "checkpoint-1"
    (path / "training_state").mkdir(parents=True)
    weights = {"q.lora_A.weight": torch.rand(3, 5), "q.lora_B.weight": torch.rand(5, 3)}
    state = {
        "state.q.lora_A.default.weight.exp_avg": torch.rand(3, 5),
        "state.q.lora_A.default.weight.step": torch.tensor(2.0),
        "rng.rank0.python_gauss": torch.tensor([float("nan")], dtype=torch.float64),
    }
    metadata = {"format": "pt"}
    safetensors.torch.save_file(weights, path / "adapter_model.safetensors", metadata)
    safetensors.torch.save_file(state, path / "training_state" / "training_state.safetensors", metadata)
    return path


def test_the_example_reads_both_files(checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "read_elsewhere.py"), str(checkpoint)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines() == [
        "2 tensors of the adapter: safetensors and torch.distributed.checkpoint agree",
        "3 tensors of the training state: both agree",
    ]


def test_a_difference_would_be_seen(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(checkpoint) == 2
    wrong = {name: tensor + 1 for name, tensor in by_dcp(checkpoint).items()}
    monkeypatch.setattr("examples.read_elsewhere.by_dcp", lambda folder: wrong)
    with pytest.raises(SystemExit, match="differs between the readers"):
        compare(checkpoint)
