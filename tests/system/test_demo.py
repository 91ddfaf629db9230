"""The examples do what they say: the demo's story with a tiny model in SmolLM2's place, and what it rests on."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from async_ckpt import latest
from tests.ranks import ROOT
from tests.system.processes import environment

EXAMPLES = ROOT / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, folder: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("demo")
    monkeypatch.setattr(module, "DIRECTORY", folder / "demo")
    monkeypatch.setattr(module, "LOG", folder / "demo.log")
    for name, value in {**environment(), **module.ENVIRONMENT, "FINETUNE_MODEL": str(folder / "model")}.items():
        monkeypatch.setenv(name, value)
    return module


def make_tiny_model(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def test_killed_ranks_go_on_from_ram(demo: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(folder / "model")
    story = demo.Story()
    demo.train(story)

    resumed = [(event["step"], event["source"]) for event in story.resumed]
    assert resumed == [(demo.KILL_STEP, "ram")] * demo.RANKS
    newest = latest(demo.DIRECTORY)
    assert newest is not None
    assert newest.name == "checkpoint-20"
    demo.show_costs(story)
    demo.check_nothing_left()
    printed = capsys.readouterr().out
    committed = [int(line.split()[1]) for line in printed.splitlines() if " commit " in line]
    assert [step for step in committed if step > demo.KILL_STEP] == [10, 12, 14, 16, 18, 20]
    assert "byte for byte" in printed


@pytest.mark.parametrize(
    ("values", "claim"),
    [({"step": 6, "source": "ram"}, "from step 6"), ({"step": 8, "source": "disk"}, "from disk")],
)
def test_demo_fails_with_its_claim(demo: ModuleType, values: dict[str, Any], claim: str) -> None:
    with pytest.raises(demo.ClaimFailed, match=claim):
        demo.Story().hear({"event": "resumed", "rank": 1, "seconds": 0.0, **values})


def test_interrupted_conversion_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo: ModuleType
) -> None:
    prepare_model = importlib.import_module("prepare_model")

    def interrupted(gguf: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_model, "gguf_path", lambda: tmp_path)
    monkeypatch.setattr(prepare_model, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_model.prepare(tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_peft_writes_an_empty_adapter_where_we_do_not() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "empty_adapter.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=3) for line in done.stdout.splitlines()[2:]]
    found = {way.strip(): (int(tensors), content) for way, tensors, _, content in rows}
    assert found == {
        "PEFT save_pretrained, before wrapping": (12, "reference"),
        "PEFT save_pretrained, wrapped model": (0, "WRONG"),
        "llama-recipes: gather all, save_pretrained": (0, "WRONG"),
        "async_ckpt": (12, "right"),
    }


def test_finetune_stays_short() -> None:
    lines = (EXAMPLES / "finetune.py").read_text().splitlines()
    assert len(lines) <= 85
