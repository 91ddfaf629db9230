"""State as JSON: what goes in comes out, type for type; what is neither JSON nor a tensor is refused by its path."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader

from async_ckpt.core.errors import CheckpointError
from async_ckpt.plain import from_plain, to_plain

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=20)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(-9, 9), inner, max_size=4)
        | st.dictionaries(st.integers(0, 9), st.integers(0, 9), max_size=3).map(Counter)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@settings(max_examples=500, deadline=None)
@given(VALUES)
def test_what_goes_in_comes_out(value: Any) -> None:
    assert same(from_plain(json.loads(json.dumps(to_plain("x", value), allow_nan=False))), value)


def test_a_nan_comes_out_as_a_nan() -> None:
    assert math.isnan(from_plain(json.loads(json.dumps(to_plain("x", math.nan), allow_nan=False))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_tensors_come_out_equal(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 3).to(dtype)
    back = from_plain(json.loads(json.dumps(to_plain("x", tensor))))
    assert back.dtype is dtype
    assert torch.equal(back, tensor)


def test_numpy_scalars_become_numbers() -> None:
    assert to_plain("x", np.float32(0.5)) == 0.5
    assert to_plain("x", np.int64(3)) == 3


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"worker": [{"rng": object()}]}, "loader.worker[0].rng is a builtins.object"),
        ((1, {2: lambda: None}), "loader[1].2 is a builtins.function"),
        ({"big": torch.zeros(1 << 20)}, "loader.big is a Tensor of shape"),
        ({"set": {1}}, "loader.set is a builtins.set"),
    ],
)
def test_what_is_neither_json_nor_a_tensor_is_refused_by_its_path(value: Any, path: str) -> None:
    with pytest.raises(CheckpointError) as error:
        to_plain("loader", value)
    assert path in str(error.value)


@pytest.mark.parametrize("content", [{"$tensor": {"dtype": "nn", "shape": [], "data": ""}}, {"$pickle": "x"},
                                     {"$float": []}, {"$bytes": "?"}, {"$tuple": 3}])  # fmt: skip
def test_what_was_not_made_by_us_is_refused(content: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        from_plain(content)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4, 4]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[3],
        ),
    ],
)
def test_torchs_schedulers_go_on_where_they_were(make: Any) -> None:
    def rates(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5, momentum=0.9)
        return optimizer, make(optimizer)

    optimizer, scheduler = fresh()
    rates(scheduler, optimizer, 3)
    saved = json.loads(json.dumps(to_plain("scheduler", scheduler.state_dict()), allow_nan=False))
    groups = json.loads(
        json.dumps(to_plain("g", {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}))
    )
    expected = rates(scheduler, optimizer, 5)
    other, resumed = fresh()
    other.param_groups[0].update(from_plain(groups))
    resumed.load_state_dict(from_plain(saved))
    assert rates(resumed, other, 5) == expected
    assert len(expected) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_stateful_loader_goes_on_where_it_was(workers: int) -> None:
    def loader() -> Any:
        return StatefulDataLoader(list(range(40)), batch_size=4, shuffle=True, num_workers=workers)

    before = loader()
    iterator = iter(before)
    for _ in range(3):
        next(iterator)
    saved = json.loads(json.dumps(to_plain("stateful.loader", before.state_dict()), allow_nan=False))
    expected = [batch.tolist() for batch in iterator]
    assert len(expected) == 7
    after = loader()
    after.load_state_dict(from_plain(saved))
    assert [batch.tolist() for batch in after] == expected


_TENSOR = {"dtype": "float32", "shape": [1], "data": "AAAAAA=="}


@pytest.mark.parametrize(
    "value",
    [
        {"$tensor": _TENSOR | {"dtype": "no_such_type"}}, {"$tensor": _TENSOR | {"dtype": "load"}},
        {"$tensor": _TENSOR | {"shape": [2**70]}}, {"$tensor": _TENSOR | {"shape": [10**12]}}, {"$tensor": 1},
        {"$tensor": _TENSOR | {"data": "AAA"}}, {"$tensor": _TENSOR | {"data": "!"}}, {"$float": []}, {"$bytes": 1},
        {"$items": [[[1], 2]]}, {"$items": 1}, {"$items": [[1]]}, {"$counter": [["a", "b", "c"]]}, {"$unknown": 1},
    ],
)  # fmt: skip
def test_content_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        from_plain(value)


def test_nesting_without_end_is_refused_both_ways() -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    for value in (endless, deep):
        with pytest.raises(CheckpointError, match="nested"):
            to_plain("state", value)
        with pytest.raises(CheckpointError, match="nested"):
            from_plain(value)
