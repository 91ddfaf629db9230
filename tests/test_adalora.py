"""AdaLoRA after its ranks were reduced: the file holds the rows and columns that PEFT selects."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig

from async_ckpt.adalora import SelectedShard, plain_pattern
from async_ckpt.adapter import plan_adapter
from async_ckpt.core.region import Region
from async_ckpt.sharding import Shard
from tests.tiny_llama import peft_model

RANK = 6


def config() -> AdaLoraConfig:
    return AdaLoraConfig(
        init_r=RANK, target_r=2, total_step=100, tinit=1, tfinal=1, target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip


def pattern(model: Any, adapter_name: str = "default") -> dict[str, list[bool]]:
    """What the allocator sets: some modules lose ranks, one keeps all, one loses all."""
    names = [
        name.removeprefix("base_model.model.")
        for name, _ in model.named_parameters()
        if f"lora_E.{adapter_name}" in name
    ]
    assert len(names) > 3
    masks = {name: [(index + number) % 3 != 0 for index in range(RANK)] for number, name in enumerate(names)}
    masks[names[0]] = [True] * RANK
    masks[names[1]] = [False] * RANK
    return masks


class Piece(Shard):
    """What a rank would hold of `whole`."""

    def __init__(self, whole: torch.Tensor, region: Region) -> None:
        super().__init__("x", tuple(whole.shape), whole.dtype, region)
        self._whole = whole

    def local(self) -> torch.Tensor:
        return part(self._whole, self.region)


def part(whole: torch.Tensor, region: Region) -> torch.Tensor:
    if region.flat:
        return whole.reshape(-1)[region.offsets[0] : region.offsets[0] + region.sizes[0]]
    return whole[tuple(slice(at, at + size) for at, size in zip(region.offsets, region.sizes, strict=True))]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_selected_part_is_the_part_of_the_selected(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    whole = torch.arange(height * width).view(height, width)
    dimension = data.draw(st.integers(0, 1))
    size = whole.shape[dimension]
    kept = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, whole.numel()))
        region = Region.run(start, data.draw(st.integers(0, whole.numel() - start)))
    else:
        top, left = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
        region = Region(
            False, (top, left), (data.draw(st.integers(0, height - top)), data.draw(st.integers(0, width - left)))
        )
    shard = SelectedShard(Piece(whole, region), dimension, kept)
    mask = torch.tensor(kept)
    selected = whole[mask] if dimension == 0 else whole[:, mask]
    assert shard.shape == tuple(selected.shape)
    assert tuple(shard.local().shape) == shard.region.sizes
    assert torch.equal(shard.local(), part(selected, shard.region))


@pytest.fixture
def reference() -> dict[str, bytes]:
    twin = peft_model(config())
    twin.peft_config["default"].rank_pattern = pattern(twin)
    with tempfile.TemporaryDirectory() as folder:
        twin.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_the_file_is_what_peft_writes(reference: dict[str, bytes]) -> None:
    model = peft_model(config())
    model.peft_config["default"].rank_pattern = pattern(model)
    before = dict(model.peft_config["default"].rank_pattern)
    plan = plan_adapter(model, documents=True)
    assert model.peft_config["default"].rank_pattern == before
    expected = safetensors.torch.load(reference["adapter_model.safetensors"])
    assert len(expected) > 9
    assert {tensor.shape[0] for name, tensor in expected.items() if name.endswith("lora_A")} >= {0, 4, RANK}
    assert {tensor.name for tensor in plan.tensors} == expected.keys()
    for tensor in plan.tensors:
        assert torch.equal(tensor.shard.local(), expected[tensor.name]), tensor.name
    ours, theirs = (json.loads(each["adapter_config.json"]) for each in (plan.documents, reference))
    assert ours["rank_pattern"] == theirs["rank_pattern"]
    assert ours.keys() == theirs.keys()


def test_a_new_pattern_is_another_version() -> None:
    model = peft_model(config())
    plan = plan_adapter(model, documents=False)
    before = plan.version()
    assert plan.version() == before
    model.peft_config["default"].rank_pattern = pattern(model)
    reduced = plan.version()
    assert reduced != before
    other = pattern(model)
    other[next(iter(other))] = [False] + [True] * (RANK - 1)
    model.peft_config["default"].rank_pattern = other
    assert plan.version() not in (before, reduced)


def test_wrappers_are_no_part_of_a_module_name() -> None:
    name = "model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.q_proj._fsdp_wrapped_module.lora_E.default"
    assert plain_pattern({name: [True, False]}, "default") == {"model.layers.0.q_proj.lora_E": [True, False]}
