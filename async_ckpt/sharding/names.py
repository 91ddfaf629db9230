"""The model without its wrappers: canonical names, and the tree as PEFT expects it.

FSDP1, activation checkpointing and `torch.compile` put a module of their own around the wrapped one, so a parameter's
path depends on how it is trained. A canonical name is the path in the unwrapped model: the same under every wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from async_ckpt.core.errors import CheckpointError

# The only child of each of torch's wrappers: the name under which it registers the module that it wraps.
WRAPPED_CHILDREN = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DDP, FSDP1, activation checkpointing and `torch.compile`, however they are nested."""
    while len(module._modules) == 1 and (inner := _wrapped(module)) is not None:
        module = inner
    return module


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the unwrapped tree with its canonical path, parents first.

    A module that is reachable by two paths comes twice: PEFT files hold a tied tensor once per name.
    """
    stack = [("", unwrap(model))]
    while stack:
        path, module = stack.pop()
        yield path, module
        if module._modules:  # most have none
            prefix = f"{path}." if path else ""
            # Only what has a single child may be a wrapper.
            stack += [
                (prefix + key, child if len(child._modules) != 1 else unwrap(child))
                for key, child in reversed(module._modules.items())
                if child is not None
            ]


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    """Every module below `model` once, wrappers included, parents first. `modules()` does the same, but passes each of
    them through a generator a level, which takes most of the time for a deep model."""
    seen: set[nn.Module | None] = {None}
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module in seen or module is None:
            continue
        seen.add(module)
        yield module
        if module._modules:  # most have none
            stack += reversed(module._modules.values())


@contextmanager
def listed_quickly(model: nn.Module) -> Iterator[None]:
    """Within the block `model` lists its modules from one list, for as long as nobody adds any: torch passes each of
    them through a generator a level."""
    names: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if module not in seen:
            seen.add(module)
            names.append((path, module))
            if module._modules:
                prefix = f"{path}." if path else ""
                stack += [(prefix + key, each) for key, each in reversed(module._modules.items()) if each is not None]

    def named_modules(
        memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        if memo is None and not prefix and remove_duplicate:
            return iter(names)
        found: Iterator[tuple[str, nn.Module]] = type(model).named_modules(model, memo, prefix, remove_duplicate)
        return found

    vars(model)["named_modules"] = named_modules
    try:
        yield
    finally:
        del vars(model)["named_modules"]


def join(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


@contextmanager
def spliced(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the tree below `model` has no wrappers; the unwrapped root is what is yielded.

    Only `_modules` entries are exchanged, so no hook of a wrapper can run and start a collective. They are put back
    however the block ends. Raises CheckpointError if the block itself left another tree behind.
    """
    root = unwrap(model)
    modules = list(dict.fromkeys(module for _, module in walk(root)))
    before = [dict(module._modules) for module in modules]
    try:
        for module in modules:
            for key, child in module._modules.items():
                if child is not None:
                    module._modules[key] = unwrap(child)
        yield root
    finally:
        changed = []
        for module, children in zip(modules, before, strict=True):
            if list(module._modules) != list(children):
                changed.append(type(module).__name__)
            for key, child in children.items():
                module._modules[key] = child
        if changed:
            raise CheckpointError(
                f"PEFT added or removed children of {', '.join(sorted(set(changed)))} while it listed the adapter's "
                "tensors; build the model anew before you train on"
            )


def require(owner: object, owner_name: str, attributes: tuple[str, ...]) -> None:
    """Raise CheckpointError if `owner` lacks one of the private `attributes` that this torch was expected to have."""
    for attribute in attributes:
        if not hasattr(owner, attribute):
            raise CheckpointError(
                f"torch {torch.__version__} has no `{attribute}` on {owner_name}, which is how async_ckpt finds its "
                "shards; use a version of torch that async_ckpt was tested with (2.6 to 2.13) or a newer async_ckpt"
            )


def _wrapped(module: nn.Module) -> nn.Module | None:
    children = module._modules
    if len(children) != 1:
        return None
    ((name, child),) = children.items()
    is_wrapper = name in WRAPPED_CHILDREN or (
        name == "module" and isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
    )
    return child if is_wrapper else None
