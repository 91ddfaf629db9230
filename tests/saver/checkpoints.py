"""Checkpoints with real content, committed by our own writer: headers by the safetensors library, several chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import save

from async_ckpt_saver.writer import CommitJob, commit

ADAPTER = "adapter_model.safetensors"
STATE = "training_state/training_state.safetensors"
DOCUMENT = "training_state/training_state.json"
CONFIG = "adapter_config.json"
LORA = "base_model.model.layer.lora_A.weight"
LARGE = "base_model.model.layer.lora_B.weight"


def adapter(seed: int = 0, large_elements: int = 8) -> dict[str, Any]:
    values = numpy.random.default_rng(seed)
    return {
        LORA: values.standard_normal((2, 3)).astype("f4"),
        LARGE: values.standard_normal(large_elements).astype("f4"),
    }


def state(names: tuple[str, ...] = ("layer.lora_A.default.weight",)) -> dict[str, Any]:
    tensors: dict[str, Any] = {f"state.{name}.exp_avg": numpy.ones((2, 3), "f4") for name in names}
    return {**tensors, "rng.rank0.python": numpy.zeros(3, "i8")}


def commit_checkpoint(directory: Path, step: int, scratch: Path, **changes: Any) -> Path:
    """`changes`: tensors, state_tensors, config, document, metrics, extra."""
    image = scratch / f"image-{step}"
    (image / "training_state").mkdir(parents=True, exist_ok=True)
    (image / ADAPTER).write_bytes(save(changes.get("tensors", adapter()), {"format": "pt"}))
    (image / STATE).write_bytes(save(changes.get("state_tensors", state()), {"format": "pt"}))
    config = changes.get("config", {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "tiny"})
    groups = [{"params": ["layer.lora_A.default.weight"], "settings": {"lr": 0.1}}]
    document = {"format": 1, "world": 1, "optimizers": [{"class": "AdamW", "param_groups": groups}]}
    result = commit(
        CommitJob(
            directory=str(directory),
            step=step,
            image=str(image),
            files=(ADAPTER, STATE),
            documents={
                CONFIG: json.dumps(config).encode(),
                DOCUMENT: json.dumps(changes.get("document", document)).encode(),
                "README.md": b"",
            },
            metrics=changes.get("metrics", {"loss": 1 / (step + 1)}),
            extra=changes.get("extra", {"epoch": 1}),
            world=1,
            run="run-1",
        )
    )
    return Path(result.path)
