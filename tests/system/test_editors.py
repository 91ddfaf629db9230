"""What writes to parameters, or replaces them, right after `save`: the file holds what `save` saw, or the save fails
and says why; never a wrong file. Only writing in place behind torch's back needs `ckpt.fence()`."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from async_ckpt import CheckpointError
from tests.system.crash_checks import ADAPTER, check_values
from tests.system.processes import run_cases
from tests.system.training import attach, rank, trained, wrapped
from tests.tiny_llama import lora

SAVES = 12
_OTHER = -7.0  # what editors write


def merge(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def load_another_adapter(model: Any) -> None:
    model.load_adapter(_saved(model), adapter_name="other")
    model.delete_adapter("other")


def load_the_same_adapter(model: Any) -> None:
    model.load_adapter(_saved(model), adapter_name="default", is_trainable=True)


def switch_adapters(model: Any) -> None:
    model.add_adapter("other", lora(r=4))
    model.set_adapter("other")
    model.set_adapter("default")
    model.delete_adapter("other")


def convert(model: Any) -> None:
    model.to(torch.bfloat16)
    model.to(torch.float32)


def load_in_place(model: Any) -> None:
    model.load_state_dict(_others(model), strict=False)


def load_below(model: Any) -> None:
    """As a library does that knows nothing of the attached model."""
    for module in model.modules():
        if "default" in dict(module.named_children()):
            module.load_state_dict({name: torch.full_like(p, _OTHER) for name, p in module.state_dict().items()})


def rebind_data(model: Any) -> None:
    for parameter in trained(model):
        parameter.data = torch.full_like(parameter, _OTHER)


def load_by_assignment(model: Any) -> None:
    model.load_state_dict(_others(model), strict=False, assign=True)
    for parameter in _lora(model):
        parameter.requires_grad_(True)


def write_in_place(model: Any) -> None:
    with torch.no_grad():
        for parameter in trained(model):
            parameter.fill_(_OTHER)


def _lora(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def _others(model: Any) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(p, _OTHER) for name, p in model.named_parameters() if "lora_" in name}


def _saved(model: Any) -> str:
    folder: Path = model.folder_of_another
    return str(folder)


def outcomes(folder: Path, editor: Callable[[Any], None], *, fence: bool) -> Counter[str]:
    """What becomes of `SAVES` saves, each followed at once by `editor`: "right", "wrong", or why it failed."""
    model = wrapped("plain", config=lora(r=64, rank_pattern={}), hidden_size=192, intermediate_size=512)
    folder.mkdir(parents=True, exist_ok=True)
    model.folder_of_another = folder / f"another-{rank()}"
    write_in_place(model)
    model.save_pretrained(model.folder_of_another)
    found: Counter[str] = Counter()
    ckpt = attach(model, directory=folder / "run", keep_last=3, timeout_s=60)
    for step in range(1, SAVES + 1):
        with torch.no_grad():
            for parameter in _lora(model):
                parameter.fill_(step)
        handle = ckpt.save(step)
        if fence:
            ckpt.fence()
        editor(model)
        found[_outcome(handle)] += 1
    ckpt.close()
    return found


def _outcome(handle: Any) -> str:
    try:
        path = handle.wait()
    except CheckpointError as error:
        return str(error).partition("): ")[2][:160]
    if rank() != 0:
        return "right"
    try:
        check_values(load_file(path / ADAPTER), handle.step)
    except AssertionError:
        return "wrong"
    return "right"


def always_right(editor: Callable[[Any], None]) -> Callable[[Path], None]:
    def case(folder: Path) -> None:
        for fence in (True, False):
            found = outcomes(folder / str(fence), editor, fence=fence)
            print(f"{editor.__name__}, fence {fence}: {dict(found)}", flush=True)
            assert found == {"right": SAVES}, found

    return case


def right_or_said(editor: Callable[[Any], None], reason: str) -> Callable[[Path], None]:
    def case(folder: Path) -> None:
        for fence in (True, False):
            found = outcomes(folder / str(fence), editor, fence=fence)
            print(f"{editor.__name__}, fence {fence}: {dict(found)}", flush=True)
            assert found.total() == SAVES
            assert all(outcome == "right" or reason in outcome for outcome in found), found
            assert found["right"] > 0 or not fence, found

    return case


def in_place(folder: Path) -> None:
    """What the fence is for; without it this test sees wrong files."""
    assert outcomes(folder / "with", write_in_place, fence=True) == {"right": SAVES}
    without = outcomes(folder / "without", write_in_place, fence=False)
    print(f"write_in_place, fence False: {dict(without)}", flush=True)
    assert without.keys() <= {"right", "wrong"}
    assert without["wrong"] > 0 or rank() != 0


def models_stay_copyable(folder: Path) -> None:
    model = wrapped("plain")
    with attach(model, directory=folder):
        assert pickle.loads(pickle.dumps(copy.deepcopy(model))).peft_config.keys() == {"default"}
        hooked = sum(len(module._load_state_dict_pre_hooks) for module in model.modules())
    left = sum(len(module._load_state_dict_pre_hooks) for module in model.modules())
    owners = [module for module in model.modules() if [*module.parameters(False), *module.buffers(False)]]
    assert hooked - left == 1 + len(owners), "the model itself, and whatever is written to"


CASES: dict[str, Callable[[Path], None]] = {
    "merge_adapter": always_right(merge),
    "load_adapter-other": always_right(load_another_adapter),
    "load_adapter-same": always_right(load_the_same_adapter),
    "set_adapter": always_right(switch_adapters),
    "load_state_dict": always_right(load_in_place),
    "load_state_dict-below": always_right(load_below),
    "data": always_right(rebind_data),
    "to-dtype": right_or_said(convert, "has torch.bfloat16 now"),
    "assign": right_or_said(load_by_assignment, "is no longer the tensor that async_ckpt was attached to"),
    "in_place": in_place,
    "models_stay_copyable": models_stay_copyable,
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("case", CASES)
def test_editors(results: dict[str, str], folder: Path, case: str) -> None:
    if not results:
        results.update(run_cases("tests.system.test_editors", list(CASES), 2, folder))
    if results[case]:
        pytest.fail(results[case], pytrace=False)
