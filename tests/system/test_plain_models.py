"""Parameters by their own names, of any module; and the caller's own files beside them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash

from tests.system.processes import run_cases
from tests.system.training import adamw, attach, full_values, refusal, step, wrapped
from tests.tiny_llama import no_collectives


def trained_values_come_back(folder: Path, kind: str) -> None:
    model = wrapped(kind)
    optimizer = adamw(model)
    step(model, optimizer)
    with no_collectives():
        ckpt = attach(model, optimizer, directory=folder, weights="trainable", files={"LICENSE": b"mine"})
    values = full_values(model)
    assert len(values) > 0
    path = ckpt.save(1, files={"notes/place.json": b'{"epoch": 1}'}).wait()
    assert "a file of its own" in refusal(lambda: ckpt.save(2, files={"model.safetensors": b""}))
    saved = safetensors.torch.load_file(path / "model.safetensors")
    assert saved.keys() == values.keys()
    assert all(torch.equal(saved[name], value) for name, value in values.items())
    files = json.loads((path / "async_ckpt.json").read_bytes())["files"]
    for name, content in {"LICENSE": b"mine", "notes/place.json": b'{"epoch": 1}'}.items():
        assert (path / name).read_bytes() == content
        assert files[name] == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    then = trained_on(model, optimizer)
    step(model, optimizer)
    assert ckpt.restore() is not None
    assert trained_on(model, optimizer) == then
    state = optimizer.state_dict()["param_groups"][0]["lr"]
    optimizer.param_groups[0]["lr"] = 2 * state
    assert ckpt.restore(1, training_state=False) is not None
    assert optimizer.param_groups[0]["lr"] == 2 * state
    again = full_values(model)
    assert all(torch.equal(again[name], value) for name, value in values.items())
    ckpt.close()


def trained_on(model: Any, optimizer: Any) -> list[float]:
    found = []
    for _ in range(2):
        step(model, optimizer)
        found += [value.double().sum().item() for value in full_values(model).values()]
    return found


def all_of_any_module(folder: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    model[0].bias.requires_grad_(False)
    ckpt = attach(model, directory=folder, weights="all")
    path = ckpt.save(1).wait()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    saved = safetensors.torch.load_file(path / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    with torch.no_grad():
        model[0].bias += 1
        model[1].running_mean += 1
    ckpt.restore()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    ckpt.close()
    model.requires_grad_(False)
    assert "has no such parameters" in refusal(lambda: attach(model, directory=folder, weights="trainable"))
    assert "weights='trainable'" in refusal(lambda: attach(model, directory=folder))
    assert "give 'auto'" in refusal(lambda: attach(model, directory=folder, weights="some"))  # type: ignore[arg-type]


CASES: dict[str, Callable[[Path], None]] = {
    **{kind: functools.partial(trained_values_come_back, kind=kind) for kind in ("ddp", "fsdp1", "fsdp2")},
    "any-module": all_of_any_module,
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", CASES)
def test_plain_models(scenario: str, selected: set[Any], folder: Path, results: dict[str, str]) -> None:
    if not results:
        results.update(run_cases(__name__, [name for name in CASES if name in selected], 2, folder))
    assert results[scenario] == ""
