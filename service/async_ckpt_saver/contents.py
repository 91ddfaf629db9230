"""Does what a checkpoint says of itself make sense? For files whose bytes are what was committed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Location

from .tensorfile import read_layout

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
STATE_FOLDER = "training_state"
STATE_TENSORS = f"{STATE_FOLDER}/training_state.safetensors"
STATE_DOCUMENT = f"{STATE_FOLDER}/training_state.json"


class _Group(msgspec.Struct, frozen=True):
    params: list[str]


class _Optimizer(msgspec.Struct, frozen=True):
    param_groups: list[_Group]


class _State(msgspec.Struct, frozen=True):
    optimizers: list[_Optimizer] = []


def unreasonable(checkpoint: Location, whole: set[str], world: int) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) for what an intact checkpoint would not say. `whole` are the files that may be read."""
    for name in sorted(whole):
        folder, base = os.path.split(name)
        if base == ADAPTER_CONFIG:
            yield from ((name, what) for what in _adapter(checkpoint, folder, name, whole))
        elif name.startswith(f"{STATE_FOLDER}/") and name.endswith(".json"):
            yield from ((name, what) for what in _document(checkpoint, name))
    if STATE_DOCUMENT in whole and STATE_TENSORS in whole:
        yield from ((STATE_TENSORS, what) for what in _state_tensors(checkpoint, world))


def read_object(path: Location) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"holds a JSON {type(found).__name__}, not an object")
    return found


def _adapter(checkpoint: Location, folder: str, name: str, whole: set[str]) -> Iterator[str]:
    try:
        config = read_object(checkpoint / name)
    except CheckpointError as error:
        yield str(error)
        return
    kind = config.get("peft_type")
    if not isinstance(kind, str) or not kind:
        yield f"names no peft_type (it is {kind!r}): PEFT cannot load this adapter"
        return
    weights = os.path.join(folder, ADAPTER_FILE)
    if weights not in whole:
        return  # damaged, and told as such; or another layout that somebody copied here
    names = [extent.spec.name for extent in read_layout(checkpoint / weights).extents]
    if not names:
        yield f"describes an adapter, but {weights} holds no tensor"
    elif kind == "LORA" and not any("lora_" in each for each in names):
        yield f"describes a LoRA adapter, but no tensor of {weights} has lora_ in its name"


def _document(checkpoint: Location, name: str) -> Iterator[str]:
    try:
        read_object(checkpoint / name)
        if name == STATE_DOCUMENT:
            parameters(checkpoint)
    except CheckpointError as error:
        yield str(error)


def _state_tensors(checkpoint: Location, world: int) -> Iterator[str]:
    """Every tensor belongs to a parameter that the document lists, or to a rank that took part."""
    try:
        listed = parameters(checkpoint)
        layout = read_layout(checkpoint / STATE_TENSORS)
    except CheckpointError:
        return  # told already
    for extent in layout.extents:
        name = extent.spec.name
        if name.startswith("state.") and listed.isdisjoint(_owners(name.removeprefix("state."))):
            yield f"tensor {name!r} belongs to no parameter that {STATE_DOCUMENT} lists"
        if name.startswith("rng.rank"):
            rank = name.removeprefix("rng.rank").partition(".")[0]
            if not rank.isdigit() or int(rank) >= world:
                yield f"tensor {name!r} is of a rank that {world} ranks do not have"


def _owners(name: str) -> Iterator[str]:
    """`<parameter>.<key>`, where either may have dots in it."""
    while name := name.rpartition(".")[0]:
        yield name


def parameters(checkpoint: Location) -> set[str]:
    """The parameters that the optimizers of a training state list. Raises CheckpointError if its document is none."""
    try:
        document = msgspec.json.decode((checkpoint / STATE_DOCUMENT).read_bytes(), type=_State)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"is no training state: {error}") from error
    return {name for optimizer in document.optimizers for group in optimizer.param_groups for name in group.params}
