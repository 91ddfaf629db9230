"""Loading into a model: it writes to parameters outside any optimizer, and torch says so before it does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

_fences: dict[int, Callable[[], None]] = {}
_numbers = itertools.count()


def fence_before_loading(model: torch.nn.Module, fence: Callable[[], None]) -> Callable[[], None]:
    """From now on `fence` is called before `load_state_dict` (and so PEFT's `load_adapter`) writes to any module of
    `model`, wherever in the model the call begins. Returns what ends that."""
    number = next(_numbers)
    _fences[number] = fence
    hooks: list[Any] = [
        module.register_load_state_dict_pre_hook(_before_loading)  # type: ignore[no-untyped-call]
        for module in model.modules()
    ]

    def end() -> None:
        _fences.pop(number, None)
        for hook in hooks:
            hook.remove()

    return end


def _before_loading(*_: Any) -> None:
    """One function for all, known by its name: a model with this hook can still be pickled and copied."""
    for fence in list(_fences.values()):
        fence()
