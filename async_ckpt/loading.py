"""Loading into a model: it writes to parameters outside any optimizer, and torch says so before it does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .sharding.names import every_module

_fences: dict[int, Callable[[], None]] = {}
_numbers = itertools.count()


def fence_before_loading(model: torch.nn.Module, fence: Callable[[], None]) -> Callable[[], None]:
    """From now on `fence` is called before `load_state_dict` (and so PEFT's `load_adapter`) writes to any module of
    `model`, wherever in the model the call begins. Returns what ends that."""
    number = next(_numbers)
    _fences[number] = fence
    hooks: list[Any] = [
        module.register_load_state_dict_pre_hook(_before_loading)  # type: ignore[no-untyped-call]
        for module in _written_to(model)
    ]

    def end() -> None:
        _fences.pop(number, None)
        for hook in hooks:
            hook.remove()

    return end


def _written_to(model: nn.Module) -> list[nn.Module]:
    """Where loading begins, and whatever has tensors of its own: torch asks each module before it writes to it."""
    modules = list(every_module(model))
    owners = [module for module in modules if module._parameters or module._buffers]
    if any(type(module)._load_from_state_dict is not nn.Module._load_from_state_dict for module in owners):
        return modules  # which may not ask, but those above it do
    return owners if model in owners else [model, *owners]


def _before_loading(*_: Any) -> None:
    """One function for all, known by its name: a model with this hook can still be pickled and copied."""
    for fence in list(_fences.values()):
        fence()
