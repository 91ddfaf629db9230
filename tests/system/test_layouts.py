"""Layouts that are not one fixed adapter: ranks given up during training, several adapters in one checkpoint."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sharding import test_dtensor, test_fsdp1
from tests.system.processes import run_cases
from tests.system.training import attach, difference, full_values, kept, rank
from tests.test_adalora import config as adalora
from tests.test_adalora import pattern
from tests.tiny_llama import lora, peft_model

ADAPTER = "adapter_model.safetensors"


def change(model: Any) -> None:
    """As a step would. AdaLoRA's own forward reads whole parameters, so it cannot train under FSDP."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1.25).add_(0.01 * (number + 1))


def ranks_given_up(folder: Path, wrap: Callable[[Any], Any]) -> None:
    """The layout follows the pattern: whole, reduced, reduced further; each file is what PEFT writes at that time."""
    model = peft_model(adalora())
    configuration = model.peft_config["default"]
    whole = pattern(model)
    model = wrap(model)
    fewer = {name: [keep and index != 4 for index, keep in enumerate(mask)] for name, mask in whole.items()}
    with attach(model, directory=folder, timeout_s=60) as ckpt:
        for number, mask in enumerate([None, None, whole, whole, fewer]):
            configuration.rank_pattern = mask
            change(model)
            values = full_values(model)
            handle = ckpt.save(number)
            ckpt.fence()
            change(model)
            assert handle.wait() == folder / f"checkpoint-{number}"
            if rank() == 0:
                twin = peft_model(adalora())
                with torch.no_grad():
                    for name, parameter in twin.named_parameters():
                        if parameter.requires_grad:
                            parameter.copy_(values[name])
                twin.peft_config["default"].rank_pattern = mask
                with tempfile.TemporaryDirectory() as plain:
                    twin.save_pretrained(plain)
                    expected = kept(Path(plain))
                written = kept(folder / f"checkpoint-{number}")
                assert difference(written[ADAPTER], expected[ADAPTER]) == "", number
                ours, theirs = (json.loads(each["adapter_config.json"]) for each in (written, expected))
                assert ours["rank_pattern"] == theirs["rank_pattern"]
    if rank() == 0:
        sizes = [(folder / f"checkpoint-{number}" / ADAPTER).stat().st_size for number in range(5)]
        assert sizes[0] == sizes[1] > sizes[2] == sizes[3] > sizes[4]


def two_adapters_in_one_checkpoint(folder: Path) -> None:
    def build() -> Any:
        model = peft_model()
        torch.manual_seed(11)
        model.add_adapter("second", lora(r=3, target_modules=["k_proj"], rank_pattern={}))
        return model

    model = test_dtensor.wrap(build())
    with attach(model, directory=folder, adapter_name=["default", "second"], timeout_s=60) as ckpt:
        path = ckpt.save(1).wait()
        before = {name: p._local_tensor.clone() for name, p in model.named_parameters() if "lora_" in name}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter._local_tensor.zero_()
        assert ckpt.restore() is not None
        assert len(before) > 8
        assert all(torch.equal(p._local_tensor, before[n]) for n, p in model.named_parameters() if n in before)
    if rank() == 0:
        with tempfile.TemporaryDirectory() as plain:
            build().save_pretrained(plain)
            expected = kept(Path(plain))
        written = kept(path)
        assert {name for name in written if name.endswith(".safetensors")} == {ADAPTER, f"second/{ADAPTER}"}
        for name in (ADAPTER, f"second/{ADAPTER}"):
            assert difference(written[name], expected[name]) == "", name
        assert "second/adapter_config.json" in written
        assert written["README.md"] == expected["README.md"]


CASES: dict[str, Callable[[Path], None]] = {
    "adalora-fsdp2": functools.partial(ranks_given_up, wrap=test_dtensor.wrap),
    "adalora-fsdp1": functools.partial(ranks_given_up, wrap=test_fsdp1.wrap),
    "adalora-ddp": functools.partial(ranks_given_up, wrap=torch.nn.parallel.DistributedDataParallel),
    "two_adapters_in_one_checkpoint": two_adapters_in_one_checkpoint,
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("case", CASES)
def test_layouts(results: dict[str, str], folder: Path, case: str) -> None:
    if not results:
        results.update(run_cases("tests.system.test_layouts", list(CASES), 2, folder))
    if results[case]:
        pytest.fail(results[case], pytrace=False)
