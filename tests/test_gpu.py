"""On a CUDA device: pinned images, a side stream, a fence on the device, and no device memory for a save."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import async_ckpt
from tests.tiny_llama import difference, lora, peft_model, saved_files, with_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def model() -> Iterator[Any]:
    yield peft_model(config=lora(r=64)).to(DEVICE)
    gc.collect()
    torch.cuda.empty_cache()


def fill(model: Any, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("staging", ["overlap", "sync"])
def test_the_file_is_what_peft_writes(model: Any, tmp_path: Path, staging: Any) -> None:
    expected = saved_files(with_values(peft_model(config=lora(r=64)), None))
    with async_ckpt.attach(model, directory=tmp_path, staging=staging) as ckpt:
        path = ckpt.save(1).wait()
    written = (path / "adapter_model.safetensors").read_bytes()
    assert difference(written, expected["adapter_model.safetensors"]) == ""


def test_a_save_allocates_nothing_on_the_device(model: Any, tmp_path: Path) -> None:
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        ckpt.save(1).wait()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for step in range(2, 6):
            ckpt.save(step).wait()
        assert torch.cuda.max_memory_allocated() == before


def test_the_image_is_pinned(model: Any, tmp_path: Path) -> None:
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        targets = ckpt._staging.slots[0].targets
        assert len(targets) > 0
        assert all(target.is_pinned() for target in targets)


@pytest.mark.parametrize("staging", ["overlap", "sync"])
@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lambda parameters: torch.optim.AdamW(parameters, lr=1.0),
        lambda parameters: torch.optim.AdamW(parameters, lr=1.0, fused=True),
    ],
)
def test_a_step_that_overwrites_everything_tears_nothing(model: Any, tmp_path: Path, make: Any, staging: Any) -> None:
    """The copy waits behind a busy stream, and the step that follows at once must wait for the copy, on the device.
    AdamW's step counts are host tensors, so both kinds of copy are under way."""
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    busy = torch.rand(2048, 2048, device=DEVICE)
    with async_ckpt.attach(model, optimizer, directory=tmp_path, staging=staging) as ckpt:
        for step in range(1, 51):
            fill(model, float(step))
            for _ in range(4):
                busy = busy @ busy / busy.norm()
            handle = ckpt.save(step)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.full_like(parameter, 1000.0)
            optimizer.step()
            tensors = read(handle.wait())
            assert len(tensors) > 0
            assert all(bool((tensor == step).all()) for tensor in tensors.values()), step


def test_save_does_not_wait_for_the_device(model: Any, tmp_path: Path) -> None:
    """With seconds of work queued on the device, save returns while that work is still running."""
    busy = torch.rand(8192, 8192, device=DEVICE)
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        ckpt.save(1).wait()
        for _ in range(50):
            busy = busy @ busy / busy.norm()
        done = torch.cuda.Event()
        done.record()
        handle = ckpt.save(2)
        assert not done.query(), "the queue was empty before save returned: make the work longer"
        handle.wait()


def test_a_restore_is_exact(model: Any, tmp_path: Path) -> None:
    before = trained(model)
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        ckpt.save(1).wait()
        fill(model, 0.0)
        restored = ckpt.restore()
        assert restored is not None
        assert restored.source == "ram"
    after = trained(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def read(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")
