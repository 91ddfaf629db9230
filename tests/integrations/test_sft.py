"""TRL's SFTTrainer with the mixin, which is all that its user adds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from async_ckpt.integrations.transformers import AsyncCheckpointMixin
from tests.integrations.trainers import Watch, logged, wrapping
from tests.system.processes import run_cases
from tests.system.test_demo import make_tiny_model
from tests.system.training import ADAPTER, kept, rank
from tests.tiny_llama import difference, lora


class MyTrainer(AsyncCheckpointMixin, SFTTrainer):
    pass


def make(folder: Path, kind: type[SFTTrainer], name: str, callbacks: Any = (), **wrapped: Any) -> Any:
    set_seed(3)
    texts = [{"text": f"{word} and {word} are {2 * number}"} for number, word in enumerate("abcdefghijkl")]
    arguments = SFTConfig(
        str(folder / name), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.01, seed=3,
        logging_steps=1, report_to="none", disable_tqdm=True, max_length=16, bf16=False, **wrapped,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", pad_token="a", eos_token="b")
    return kind(
        str(folder / "model"), arguments, train_dataset=Dataset.from_list(texts), peft_config=lora(lora_dropout=0.3),
        processing_class=tokenizer, callbacks=list(callbacks),
    )  # fmt: skip


def saves_and_goes_on(folder: Path, kind: str) -> None:
    if rank() == 0:
        make_tiny_model(folder / "model")
    dist.barrier()
    with wrapping(kind) as wrapped:
        whole = make(folder, MyTrainer, "whole", **wrapped)
        whole.train()
        make(folder, MyTrainer, "parts", [Watch(stop_after=2)], **wrapped).train()
        again = make(folder, MyTrainer, "parts", **wrapped)
        again.train(resume_from_checkpoint=True)
        again.save_model(str(folder / "final"))
    dist.barrier()
    assert [entry[0] for entry in logged(again)] == [1, 2, 3, 4]
    assert logged(again) == logged(whole)
    last = kept(folder / "parts" / "checkpoint-4")
    files = json.loads(last["async_ckpt.json"])["files"]
    assert {ADAPTER, "trainer_state.json", "tokenizer.json", "tokenizer_config.json"} <= files.keys()
    if rank() == 0:
        assert difference(kept(folder / "final")[ADAPTER], last[ADAPTER]) == ""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    values = [p for name, p in PeftModel.from_pretrained(base, folder / "final").named_parameters() if "lora_B" in name]
    assert len(values) > 0
    assert all(value.count_nonzero() > 0 for value in values)


CASES: dict[str, Callable[[Path], None]] = {
    "fsdp2": lambda folder: saves_and_goes_on(folder, "fsdp2"),
    "ddp": lambda folder: saves_and_goes_on(folder, "ddp"),
}


FULL = {"ddp"}
SCENARIOS = [pytest.param(name, marks=pytest.mark.full if name in FULL else ()) for name in CASES]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_sft(scenario: str, selected: set[Any], folder: Path, results: dict[str, str]) -> None:
    if not results:
        results.update(run_cases(__name__, [name for name in CASES if name in selected], 2, folder))
    assert results[scenario] == ""
