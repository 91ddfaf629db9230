"""Every save is followed at once by steps that overwrite all of it: each file holds the values of one moment, all the
same, with nothing done by the user. Without the fence the same test sees torn files.

Each optimizer here adds exactly 1 to every value in a step, so the file of step n holds the number n and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import async_ckpt
from tests.system.crash_checks import ADAPTER, check_values
from tests.system.processes import run_cases
from tests.system.training import attach, forward, rank, trained, wrapped
from tests.tiny_llama import lora

_LIMIT_S = 60.0
_SLICE, _ALL = 12, 1000  # saves: under each wrapper, and for each way of stepping over all its wrappers

Step = Callable[[], None]


def counting(parameters: list[nn.Parameter], **options: bool) -> torch.optim.AdamW:
    """With gradients of -1, each step adds 1."""
    return torch.optim.AdamW(parameters, lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, **options)


def at_once(model: nn.Module, **options: bool) -> tuple[Any, Step]:
    for parameter in trained(model):
        parameter.grad = torch.full_like(parameter, -1.0)
    optimizer = counting(trained(model), **options)
    return optimizer, optimizer.step


def several(model: nn.Module) -> tuple[Any, Step]:
    """AdamW for one half, SGD for the other."""
    for parameter in trained(model):
        parameter.grad = torch.full_like(parameter, -1.0)
    optimizers = [counting(trained(model)[::2]), torch.optim.SGD(trained(model)[1::2], lr=1.0)]
    return optimizers, lambda: [optimizer.step() for optimizer in optimizers] and None


def in_backward(model: nn.Module) -> tuple[Any, Step]:
    """An optimizer a parameter, which steps as soon as the gradient is there and frees it: the known recipe. Only the
    gradient's value is replaced, so that the file can be judged."""
    optimizers = {parameter: counting([parameter]) for parameter in trained(model)}

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.fill_(-1.0)
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(hook)
    return list(optimizers.values()), lambda: forward(model).backward()


WAYS: dict[str, tuple[Callable[[nn.Module], tuple[Any, Step]], tuple[str, ...]]] = {
    "foreach": (lambda model: at_once(model, foreach=True), ("plain", "ddp", "fsdp1", "fsdp2")),
    "fused": (lambda model: at_once(model, fused=True), ("plain", "ddp", "fsdp1", "fsdp2")),
    "for-loop": (lambda model: at_once(model, foreach=False), ("plain", "ddp", "fsdp1", "fsdp2")),
    "several": (several, ("plain", "ddp", "fsdp1", "fsdp2")),
    "in-backward": (in_backward, ("plain", "fsdp2")),  # DDP and FSDP1 do not run such hooks on reduced gradients
}


def torn_files(folder: Path, wrapper: str, way: str, saves: int, *, fence: bool) -> int:
    """How many of `saves` checkpoints hold anything but the values at the moment of the save."""
    torch.manual_seed(0)
    model = wrapped(wrapper, config=lora(r=64, rank_pattern={}), hidden_size=192, intermediate_size=512)
    forward(model).backward()  # FSDP1 moves its shards in the first one
    for parameter in trained(model):
        parameter.grad = None
    with torch.no_grad():
        for parameter in trained(model):
            parameter.zero_()
    optimizers, step = WAYS[way][0](model)
    torn, handles = 0, []
    with attach(model, optimizers, directory=folder, keep_last=4, timeout_s=_LIMIT_S) as ckpt:
        if not fence:
            ckpt._hook.remove()
        for number in range(1, saves + 1):
            step()
            handles.append(ckpt.save(number))
            if len(handles) > 2:
                torn += is_torn(handles.pop(0))
        step()
        torn += sum(is_torn(handle) for handle in handles)
    return torn


def is_torn(handle: async_ckpt.SaveHandle) -> bool:
    from safetensors.numpy import load_file

    path = handle.wait()
    if rank() != 0:
        return False
    try:
        check_values(load_file(path / ADAPTER), handle.step)
    except AssertionError:
        return True
    return False


def whole(way: str, wrappers: Sequence[str], saves: int) -> Callable[[Path], None]:
    def case(folder: Path) -> None:
        for wrapper in wrappers:
            torn = torn_files(folder / wrapper, wrapper, way, saves, fence=True)
            print(f"{wrapper} {way}: {torn} of {saves} torn", flush=True)
            assert torn == 0, f"{wrapper} {way}: {torn} of {saves} torn"

    return case


def control(folder: Path) -> None:
    """The test can see what it looks for."""
    for wrapper, way in (("plain", "foreach"), ("fsdp1", "foreach"), ("fsdp2", "foreach"), ("fsdp2", "for-loop")):
        torn = torn_files(folder / f"{wrapper}-{way}", wrapper, way, 60, fence=False)
        print(f"without the fence, {wrapper} {way}: {torn} of 60 torn", flush=True)
        assert torn > 0 or rank() != 0, f"{wrapper} {way}: nothing was torn"


_SLICES = {f"{way}-slice": whole(way, wrappers[-2:], _SLICE) for way, (_, wrappers) in WAYS.items()}
_THOUSANDS = {f"{way}-1000": whole(way, wrappers, _ALL // len(wrappers)) for way, (_, wrappers) in WAYS.items()}
CASES = {**_SLICES, "control": control, **_THOUSANDS}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("case", [*_SLICES, "control"])
def test_torn(results: dict[str, str], folder: Path, case: str) -> None:
    if not results:
        results.update(run_cases("tests.system.test_torn", [*_SLICES, "control"], 2, folder))
    if results[case]:
        pytest.fail(results[case], pytrace=False)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", _THOUSANDS)
def test_torn_in_a_thousand(folder: Path, case: str) -> None:
    assert run_cases("tests.system.test_torn", [case], 2, folder, timeout_s=800) == {case: ""}
