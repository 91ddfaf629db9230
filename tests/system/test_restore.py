"""A checkpoint goes into another model, under another wrapper, on another number of ranks, and comes out the same."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

import async_ckpt
from tests.system.processes import Job, Scenario, run_cases, run_together, savers, the_saver, until
from tests.system.training import (
    ADAPTER,
    adamw,
    attach,
    check_checkpoint,
    everywhere,
    full_values,
    keep,
    kept,
    kill_all_ranks,
    rank,
    reference,
    refusal,
    sleep_until_killed,
    step,
    trained,
    wrapped,
)
from tests.tiny_llama import evaluate, lora

_HERE = "tests.system.test_restore"
_METRICS = {"loss": 0.25, "epoch": 3, "best": True, "note": "ä", "missing": None}
_EXTRA = {"sampler": {"seed": 7, "seen": [1, 2, 3]}, "text": "ü", "none": None, "ratio": 0.1}
_WHOLE = {"modules_to_save": ["lm_head"]}


def other_weights(kind: str, shift: int = 1, **config: Any) -> Any:
    """A model in which no trained value is what `wrapped` gives, as after another random initialisation."""
    model = wrapped(kind, config=lora(**config))
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(float(shift))
    return model


# --- from wrapper to wrapper ---------------------------------------------------------------------------------------

HOPS = (("fsdp2", 2), ("fsdp1", 3), ("ddp", 2), ("plain", 1), ("fsdp1_flat", 2), ("fsdp2", 3))


def hop(folder: str, kind: str, number: str, modules_to_save: str) -> None:
    """Restore what the hop before has saved, and save it again under the next number."""
    config: dict[str, Any] = _WHOLE if modules_to_save else {}
    directory, at = Path(folder, "run"), int(number)
    model = other_weights(kind, at + 1, **config)
    optimizer = adamw(model)
    step(model, optimizer)
    before = full_values(model)
    with attach(model, directory=directory, timeout_s=60) as ckpt:
        resumed = ckpt.restore()
        if at == 0:
            assert resumed is None
            assert all(torch.equal(value, before[name]) for name, value in full_values(model).items())
            keep(Path(folder, "expected"), reference(lora(**config), values=before))
        else:
            assert resumed is not None
            assert (resumed.step, resumed.source) == (at - 1, "disk")
            assert resumed.path == directory / f"checkpoint-{at - 1}"
            assert resumed.metrics == _METRICS
            assert resumed.extra == _EXTRA
            assert all(not torch.equal(value, before[name]) for name, value in full_values(model).items())
        ckpt.save(at, metrics=_METRICS, extra=_EXTRA).wait()


def from_wrapper_to_wrapper(folder: Path, modules_to_save: str) -> None:
    hops = [hop for hop in HOPS if not (modules_to_save and hop[0] == "fsdp1_flat")]
    for number, (kind, world) in enumerate(hops):
        with Job(f"{_HERE}:hop", world, folder, kind, str(number), modules_to_save) as job:
            job.wait()
        check_checkpoint(folder / f"run/checkpoint-{number}", kept(folder / "expected"), number)


# --- in one job ----------------------------------------------------------------------------------------------------


def check_values(model: torch.nn.Module, path: Path) -> None:
    """Assert that the model holds what the file at `path` does, whatever the names."""
    values = {name.replace(".default", ""): value for name, value in full_values(model).items()}
    values = {name.replace(".modules_to_save", ""): value for name, value in values.items()}
    saved = safetensors.torch.load_file(path / ADAPTER)
    assert len(saved) > 0
    assert saved.keys() == values.keys()
    assert all(torch.equal(saved[name], value) for name, value in values.items())


def used_by_the_next_forward(folder: Path, kind: str) -> None:
    """FSDP keeps unsharded copies of its root unit after an evaluation: they must not outlive a restore."""
    config = {} if kind == "fsdp1_flat" else _WHOLE
    model = other_weights(kind, **config)
    optimizer = adamw(model)
    ckpt = attach(model, optimizer, directory=folder, timeout_s=60)
    step(model, optimizer)
    ckpt.save(1)
    expected = evaluate(model)
    for _ in range(2):
        step(model, optimizer)
    ckpt.save(2)
    later = evaluate(model)
    assert not torch.equal(later, expected)
    ckpt.wait()
    dist.barrier()
    resumed = ckpt.restore(1)
    assert resumed is not None
    assert resumed.step == 1
    assert torch.equal(evaluate(model), expected)
    check_values(model, folder / "checkpoint-1")
    resumed = ckpt.restore(folder / "checkpoint-2")
    assert resumed is not None
    assert torch.equal(evaluate(model), later)
    step(model, optimizer)
    with pytest.raises(async_ckpt.CheckpointError, match="2"):
        ckpt.save(2)
    ckpt.save(3).wait()
    ckpt.close()


def does_not_fit(folder: Path) -> None:
    """Another rank, fewer or more targets: every rank gets the list, and no value of the model changes."""
    with attach(wrapped("fsdp2"), directory=folder, timeout_s=60) as ckpt:
        ckpt.save(1).wait()
    dist.barrier()
    mismatches: list[tuple[dict[str, Any], str]] = [
        ({"r": 3}, r"q_proj.lora_A.weight: F32 \[1, 24\] in the file, F32 \[3, 24\] in the model"),
        ({"target_modules": ["q_proj"]}, r"down_proj.lora_A.weight: in the file, but not in the model"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head.weight: not in the file"),
    ]
    for config, fact in mismatches:
        model = other_weights("fsdp1", **config)
        optimizer = adamw(model)
        step(model, optimizer)
        before, loss = full_values(model), evaluate(model)
        with attach(model, optimizer, directory=folder, timeout_s=60) as ckpt:
            for message in everywhere(refusal(ckpt.restore)):
                assert re.search(fact, message), message
                assert "checkpoint-1" in message
        assert all(torch.equal(value, before[name]) for name, value in full_values(model).items())
        assert torch.equal(evaluate(model), loss)
        step(model, optimizer)


CASES: dict[str, Callable[[Path], None]] = {
    **{
        f"used_by_the_next_forward-{kind}": functools.partial(used_by_the_next_forward, kind=kind)
        for kind in ("ddp", "fsdp2", "fsdp1", "fsdp1_flat", "fsdp2_compiled")
    },
    "does_not_fit": does_not_fit,
}


def within_the_ranks(selected: set[str]) -> dict[str, Scenario]:
    """Those of `CASES` that are selected, as one scenario."""
    names = [name for name in CASES if name in selected]
    return {"within the ranks": lambda folder: run_cases(_HERE, names, 2, folder)} if names else {}


# --- after a crash -------------------------------------------------------------------------------------------------


def staged_and_killed(folder: str) -> None:
    """The launcher, torchrun's part in a restart, is the process above."""
    pids = everywhere(os.getpid())
    model = other_weights("fsdp2")
    optimizer = adamw(model)
    ckpt = attach(model, optimizer, directory=Path(folder, "run"), timeout_s=60)
    step(model, optimizer)
    ckpt.save(1).wait()
    step(model, optimizer)
    keep(Path(folder, "expected"), reference(values=full_values(model)))
    handle = ckpt.save(2, metrics=_METRICS, extra=_EXTRA)
    step(model, optimizer)
    if rank() == 0:
        handle.staged()
        kill_all_ranks(pids)
    sleep_until_killed()


def resumes(folder: str, kind: str, source: str) -> None:
    directory = Path(folder, "run")
    model = other_weights(kind)
    ckpt = attach(model, directory=directory, timeout_s=60)
    if rank() == 0 and source == "ram":
        # Were the bytes read from here, it would show.
        weights = directory / "checkpoint-2" / ADAPTER
        weights.write_bytes(b"\0" * weights.stat().st_size)
    dist.barrier()
    resumed = ckpt.restore()
    assert resumed is not None
    assert (resumed.step, resumed.source, resumed.path) == (2, source, directory / "checkpoint-2")
    assert (resumed.metrics, resumed.extra) == (_METRICS, _EXTRA)
    values = full_values(model)
    if rank() == 0:
        assert reference(values=values)[ADAPTER] == Path(folder, "expected", ADAPTER).read_bytes()
    assert ckpt.save(3).wait() == directory / "checkpoint-3"
    ckpt.close()


def after_a_crash(folder: Path, source: str) -> None:
    with Job(f"{_HERE}:staged_and_killed", 2, folder) as job:
        job.wait(expected=-signal.SIGKILL)
    newest = folder / "run/checkpoint-2"
    until(lambda: async_ckpt.latest(folder / "run") == newest, "step 2 committed")
    if source == "disk":
        pid = the_saver(folder)
        until(lambda: not savers(folder), f"saver {pid} no longer waits for a restart", 30.0)
    with Job(f"{_HERE}:resumes", 3, folder, "fsdp1", source) as job:
        job.wait()
    manifest = json.loads((folder / "run/checkpoint-3/async_ckpt.json").read_text())
    assert manifest["files"][ADAPTER]["bytes"] == (folder / "expected" / ADAPTER).stat().st_size


SCENARIOS: dict[str, Scenario] = {
    "from_wrapper_to_wrapper": functools.partial(from_wrapper_to_wrapper, modules_to_save=""),
    "from_wrapper_to_wrapper-modules_to_save": functools.partial(from_wrapper_to_wrapper, modules_to_save="lm_head"),
    "after_a_crash-ram": functools.partial(after_a_crash, source="ram"),
    "after_a_crash-disk": functools.partial(after_a_crash, source="disk"),
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", [*SCENARIOS, *CASES])
def test_restore(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        chosen = {name: SCENARIOS[name] for name in SCENARIOS if name in selected}
        results.update(run_together({**within_the_ranks(selected), **chosen}, folder, at_once=4))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
