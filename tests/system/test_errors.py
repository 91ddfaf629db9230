"""Every refusal is a CheckpointError on every rank that says what to do; it leaves nothing, and training goes on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import async_ckpt
from tests.system.processes import run_cases
from tests.system.training import (
    adamw,
    attach,
    check_checkpoint,
    everywhere,
    full_values,
    rank,
    reference,
    refusal,
    refused,
    step,
    wrapped,
)
from tests.tiny_llama import lora

_HERE = "tests.system.test_errors"


def still_saves(directory: Path, number: int = 1) -> None:
    """A refusal does not stand in the way of the next attach."""
    model = wrapped("fsdp2")
    expected = reference()
    with attach(model, directory=directory, timeout_s=60) as ckpt:
        path = ckpt.save(number).wait()
    if rank() == 0:
        check_checkpoint(path, expected, number)


def a_rank_is_missing(folder: Path) -> None:
    """The late one hears the same reason, and at the next try all are there."""
    model = wrapped("fsdp2")

    def late() -> str:
        return refusal(lambda: attach(model, directory=folder / "run", timeout_s=2))

    message = late() if rank() == 0 else ""
    dist.barrier()
    message = message or late()
    for said in everywhere(message):
        assert re.search(r"rank 1 of 2 did not attach within 2 s", said), said
    assert not (folder / "run").exists()
    step(model, adamw(model))
    still_saves(folder / "run")


def one_rank_cannot_attach(folder: Path) -> None:
    """The others hear its reason, not their own timeout."""
    name = "default" if rank() == 0 else "nope"
    messages = refused(folder / "run", r"no adapter named 'nope'", "'default'", adapter_name=name, timeout_s=600)
    assert "rank 1" in messages[0]
    still_saves(folder / "run")


def layouts_differ(folder: Path) -> None:
    config = lora(rank_pattern={"gate_proj": 5 + rank()})
    refused(folder / "run", r"tensor '.*gate_proj.lora_[AB].weight'", r"\[6, 24\].*rank 1", r"\[5, 24\].*rank 0",
            model=wrapped("plain", config=config))  # fmt: skip
    config = lora(target_modules=["q_proj", "v_proj"][: 2 - rank()])
    refused(folder / "run", r"rank 1 has no tensor '.*v_proj.*', which rank 0 has",
            model=wrapped("plain", config=config))  # fmt: skip
    still_saves(folder / "run")


def options_differ(folder: Path) -> None:
    refused(folder / "run", r"slots=[23]", r"they must agree", slots=2 + rank())
    still_saves(folder / "run")


def not_a_peft_model(folder: Path) -> None:
    model = torch.nn.Linear(2, 2)
    messages = everywhere(refusal(lambda: attach(model, directory=folder / "run", timeout_s=60)))
    wanted = r"a Linear and holds neither a PeftModel nor a transformers PreTrainedModel.*get_peft_model"
    assert all(re.search(wanted, message) for message in messages), messages
    assert not (folder / "run").exists()
    still_saves(folder / "run")


def no_such_adapter(folder: Path) -> None:
    refused(folder / "run", r"no adapter named 'other'", r"it has 'default'", adapter_name="other")
    still_saves(folder / "run")


def directory_below_a_file(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "file").touch()
    refused(folder / "file" / "run", rf"cannot write to {folder}/file/run", "Not a directory", "choose another")


def saver_not_reachable(folder: Path) -> None:
    refused(folder / "run", r"no saver answers at ipc:///nonexistent/x.sock after 1 s", r"async-ckpt-saver run --bind",
            saver="ipc:///nonexistent/x.sock", timeout_s=1)  # fmt: skip


def wrong_arguments(folder: Path) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        (r"slots=0\b.*1 to 16", {"slots": 0}),
        (r"replicas=2\b.*give 0, or 1", {"replicas": 2}),
        (r"slots=17\b", {"slots": 17}),
        (r"slots='2'", {"slots": "2"}),
        (r"slots=True", {"slots": True}),
        (r"when_busy='drop'.*'wait' or 'skip'", {"when_busy": "drop"}),
        (r"staging='async'.*'overlap' or 'sync'", {"staging": "async"}),
        (r"timeout_s=0\b", {"timeout_s": 0}),
        (r"timeout_s=-1\b", {"timeout_s": -1}),
        (r"timeout_s=nan", {"timeout_s": float("nan")}),
        (r"timeout_s='5'", {"timeout_s": "5"}),
        (r"keep_last=0", {"keep_last": 0}),
        (r"keep_every=2.5", {"keep_every": 2.5}),
        (r"keep_best=\('loss', 'lowest', 1\)", {"keep_best": ("loss", "lowest", 1)}),
    ]
    model = wrapped("fsdp2")
    for fact, options in wrong:
        message = refusal(lambda options=options: attach(model, directory=folder / "run", **options))
        assert re.search(fact, message), message
    assert not (folder / "run").exists()
    still_saves(folder / "run")


def attached_twice(folder: Path) -> None:
    model = wrapped("fsdp2")
    with attach(model, directory=folder / "run", timeout_s=60) as ckpt:
        for same in (folder / "run", os.path.relpath(folder / "run")):
            message = refusal(lambda same=same: attach(model, directory=same, timeout_s=60))
            assert re.search(r"run is attached already in this process: close\(\)", message)
        ckpt.save(1).wait()
    still_saves(folder / "run", 2)


def wrong_saves(folder: Path) -> None:
    model = wrapped("fsdp2")
    optimizer = adamw(model)
    ckpt = attach(model, optimizer, directory=folder, timeout_s=60)
    ckpt.save(5)
    for wrong, fact in ((5, "step 5 was saved already"), (4, "step 5 was saved already"), (-1, "-1")):
        assert fact in refusal(lambda wrong=wrong: ckpt.save(wrong))
    wrong_metrics: list[dict[Any, Any]] = [
        {"loss": object()},
        {"loss": [1.0]},
        {"loss": torch.ones(2)},
        {7: 1.0},
        {"loss": 10**30},
        {"note": "\ud800"},
    ]
    for metrics in wrong_metrics:
        assert "metrics" in refusal(lambda metrics=metrics: ckpt.save(6, metrics=metrics))
    for extra in (object(), {"a": torch.ones(1)}, {"a": "\ud800"}, {"a": {1j}}):
        assert "extra" in refusal(lambda extra=extra: ckpt.save(6, extra=extra))
    step(model, optimizer)
    assert ckpt.save(6, metrics={"loss": torch.ones(1)}).wait() == folder / "checkpoint-6"
    ckpt.close()
    ckpt.close()
    assert "save(7) after close()" in refusal(lambda: ckpt.save(7))
    assert "after close()" in refusal(ckpt.restore)
    assert sorted(os.listdir(folder)) == ["checkpoint-5", "checkpoint-6", "latest"]
    dist.barrier()
    step(model, optimizer)


def directory_holds_a_newer_checkpoint(folder: Path) -> None:
    still_saves(folder, 10)
    model = wrapped("fsdp2")
    with attach(model, directory=folder, timeout_s=60) as ckpt:
        for number in (3, 10):
            message = refusal(lambda number=number: ckpt.save(number))
            assert f"{folder} already holds checkpoint-10" in message
            assert "restore()" in message
        assert async_ckpt.latest(folder) == folder / "checkpoint-10"
        resumed = ckpt.restore()
        assert resumed is not None
        assert resumed.step == 10
        ckpt.save(11).wait()


def wrong_restores(folder: Path) -> None:
    still_saves(folder, 1)
    model = wrapped("fsdp2", config=lora(r=2))
    before = full_values(model)
    with attach(model, directory=folder, timeout_s=60) as ckpt:
        assert "checkpoint-7" in refusal(lambda: ckpt.restore(7))
        assert str(folder / "nowhere") in refusal(lambda: ckpt.restore(folder / "nowhere"))
        message = refusal(ckpt.restore)
        assert re.search(r"q_proj.lora_A.weight: F32 \[1, 24\] in the file, F32 \[2, 24\] in the model", message)
    assert all(torch.equal(before[name], value) for name, value in full_values(model).items())
    step(model, adamw(model))


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case
    for case in (
        a_rank_is_missing,
        one_rank_cannot_attach,
        layouts_differ,
        options_differ,
        not_a_peft_model,
        no_such_adapter,
        directory_below_a_file,
        saver_not_reachable,
        wrong_arguments,
        attached_twice,
        wrong_saves,
        directory_holds_a_newer_checkpoint,
        wrong_restores,
    )
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", CASES)
def test_errors(results: dict[str, str], selected: set[str], folder: Path, scenario: str) -> None:
    if not results:
        results.update(run_cases(_HERE, [name for name in CASES if name in selected], 2, folder))
    if results[scenario]:
        pytest.fail(results[scenario], pytrace=False)
