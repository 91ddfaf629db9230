"""attach, save, train on, wait, close under every wrapper: what is committed is what PEFT writes for a plain twin."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel

import async_ckpt
from tests.system.processes import assert_torch_free, run_cases, savers, the_saver
from tests.system.training import (
    WRAPPERS,
    adamw,
    attach,
    check_checkpoint,
    collectives,
    everywhere,
    full_values,
    no_collectives,
    rank,
    reference,
    step,
    wrapped,
)
from tests.tiny_llama import base_model, evaluate, lora, with_values
from tests.tiny_llama import peft_model as twin_model

ATTACHED = ("new", "forward", "evaluated")
_TOKENS = torch.arange(12).view(2, 6)


@contextmanager
def silent() -> Iterator[None]:
    """Assert that the block begins no collective, in whatever thread."""
    before = collectives()
    with no_collectives():
        yield
    assert collectives() == before


def saves(folder: Path, kind: str, attached: str, **twin: Any) -> None:
    """Two saves, each followed at once by a step that overwrites everything."""
    model = wrapped(kind, **twin)
    optimizer = adamw(model)
    if attached != "new":
        step(model, optimizer)
    if attached == "evaluated":
        evaluate(model)
    with silent():
        ckpt = attach(model, optimizer, directory=folder, timeout_s=60)
    handles, expected, values = [], [], []
    for number in (1, 2):
        step(model, optimizer)
        values.append(full_values(model))
        expected.append(reference(values=values[-1], **twin))
        with silent():
            handles.append(ckpt.save(number, metrics={"loss": number / 2}, extra={"tokens": [number]}))
        step(model, optimizer)
    if rank() == 0:
        assert_torch_free(the_saver(folder))
    with silent():
        paths = [handle.wait() for handle in handles]
        ckpt.close()
    assert paths == [folder / "checkpoint-1", folder / "checkpoint-2"]
    assert [handle.state for handle in handles] == ["committed", "committed"]
    assert async_ckpt.latest(folder) == folder / "checkpoint-2"
    assert os.readlink(folder / "latest") == "checkpoint-2"
    after = full_values(model)
    assert all(not torch.equal(after[name], value) for name, value in values[1].items())
    if rank() == 0:
        for number, path, files in zip((1, 2), paths, expected, strict=True):
            manifest = check_checkpoint(path, files, number)
            assert manifest["metrics"] == {"loss": number / 2}
            assert manifest["extra"] == {"tokens": [number]}
            assert manifest["world"] == dist.get_world_size()
        loads_with_peft(paths[1], values[1], **twin)


def loads_with_peft(path: Path, values: dict[str, torch.Tensor], **twin: Any) -> None:
    loaded = PeftModel.from_pretrained(base_model(), str(path)).eval()
    original = with_values(twin_model(**twin), values).eval()
    with torch.no_grad():
        logits = loaded(input_ids=_TOKENS).logits
        assert torch.equal(logits, original(input_ids=_TOKENS).logits)
        assert not torch.equal(logits, base_model().eval()(input_ids=_TOKENS).logits)


def whole_modules(folder: Path, kind: str) -> None:
    """Embeddings and head are saved whole, and lie in FSDP's root unit, which an evaluation leaves unsharded."""
    saves(folder, kind, "evaluated", config=lora(modules_to_save=["lm_head", "embed_tokens"]))


def shards_are_uneven_and_empty(folder: Path) -> None:
    """What the other cases rest on: under FSDP2, r=1 leaves ranks with nothing, and r=5 is not divided evenly."""
    model = wrapped("fsdp2")
    numels = everywhere({name: p._local_tensor.numel() for name, p in model.named_parameters() if "lora_" in name})
    assert any(min(sizes) == 0 < max(sizes) for sizes in zip(*(n.values() for n in numels), strict=True))
    assert any(0 < min(sizes) < max(sizes) for sizes in zip(*(n.values() for n in numels), strict=True))


def collectives_would_be_seen(folder: Path) -> None:
    """The counting that the other cases rest on counts: a step of each wrapper, and each of torch's own calls."""
    for kind in ("ddp", "fsdp2", "fsdp1", "fsdp1_flat", "fsdp2_compiled"):
        model = wrapped(kind)
        optimizer = adamw(model)
        before = collectives()
        step(model, optimizer)
        assert collectives() > before, kind
        with pytest.raises(AssertionError), silent():
            step(model, optimizer)
        optimizer.zero_grad()
    calls: list[Callable[[], object]] = [
        dist.barrier,
        lambda: dist.all_reduce(torch.ones(1)),
        lambda: everywhere(0),
        lambda: torch.ops._c10d_functional.all_reduce(torch.ones(1), "sum", dist.group.WORLD.group_name),
    ]
    for call in calls:
        before = collectives()
        call()
        assert collectives() > before


def one_saver_serves_all_ranks(folder: Path) -> None:
    model = wrapped("fsdp2")
    with attach(model, directory=folder, timeout_s=60) as ckpt:
        everywhere(0)
        assert len(savers(folder)) == 1
        ckpt.save(1).wait()
        everywhere(0)


def _cases() -> Iterator[tuple[str, Callable[[Path], None]]]:
    for kind in WRAPPERS:
        for attached in ATTACHED:
            yield f"{kind}-{attached}", functools.partial(saves, kind=kind, attached=attached)
        yield f"{kind}-whole-modules", functools.partial(whole_modules, kind=kind)
    for case in (shards_are_uneven_and_empty, collectives_would_be_seen, one_saver_serves_all_ranks):
        yield case.__name__, case


CASES = dict(_cases())
_ONE = [f"{kind}-{attached}" for kind in ("plain", "fsdp2", "fsdp1") for attached in ATTACHED]
# modules_to_save under flat parameters is refused: tests/sharding/test_fsdp1.py
_SHARDED = [name for name in CASES if not name.startswith(("plain", "fsdp1_flat-whole"))]
# Three ranks run everything: no size of the model divides by 3, and with r=1 two of them hold nothing.
_TWO = [name for name in _SHARDED if not name.endswith(("-forward", "whole-modules"))]
WORLDS = {1: [*_ONE, "plain-whole-modules"], 2: _TWO, 3: _SHARDED}
# Compiling takes ten times as long as the rest of a case, and changes neither what is held where nor when. Every day
# it is attached to after all that can come before; test_training_state.py attaches before anything is compiled.
_FULL = {(world, case) for world, cases in WORLDS.items() for case in cases if case.startswith("fsdp2_compiled")}
_FULL -= {(3, "fsdp2_compiled-evaluated")}


@pytest.fixture(scope="module")
def results() -> dict[int, dict[str, str]]:
    return {}


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(world, case, marks=pytest.mark.full if (world, case) in _FULL else ())
        for world, cases in WORLDS.items()
        for case in cases
    ],
)
def test_wrappers(
    results: dict[int, dict[str, str]], request: pytest.FixtureRequest, folder: Path, world: int, case: str
) -> None:
    if world not in results:
        items = [item for item in request.session.items if getattr(item, "function", None) is request.function]
        chosen = [item.callspec.params for item in items]  # type: ignore[attr-defined]
        names = [each["case"] for each in chosen if each["world"] == world]
        results[world] = run_cases("tests.system.test_wrappers", names, world, folder)
    if results[world][case]:
        pytest.fail(results[world][case], pytrace=False)
