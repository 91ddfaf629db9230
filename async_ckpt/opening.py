"""A checkpoint directory, opened for one plan: checked as a whole first, then read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import torch

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_DOCUMENT_BYTES
from async_ckpt.core.location import Location, Url

from .mapped import Slot
from .optimizer_state import StateShard
from .plan import Plan, make_target
from .restore import OpenFile, Target, mismatch
from .training_state import DOCUMENT, TENSORS_FILE, TrainingState, local_document

log = logging.getLogger(__name__)


class OpenCheckpoint:
    """`documents` is where the JSON lies, `tensors` where the safetensors files do: the same directory, or an image in
    RAM for the tensors, of `slot` if that is one of this run. Raises CheckpointError, before anything is changed, if it
    does not fit the plan."""

    def __init__(self, plan: Plan, documents: Location, tensors: Location, slot: Slot | None = None) -> None:
        self._weights = _assign(plan, tensors, slot)
        differences = _other_bases(plan, documents)
        differences += [line for file, targets in self._weights for line in file.differences(targets)]
        self._state: _OpenState | None = None
        if plan.state is not None:
            if (documents / DOCUMENT).exists():
                self._state = _OpenState(plan.state, documents, _open(plan, tensors / TENSORS_FILE, slot))
                differences += self._state.differences
            else:
                log.warning("%s holds no training state: only the weights are restored", documents)
        if differences:
            raise mismatch(documents, differences)

    def read(self) -> None:
        for file, targets in self._weights:
            file.read_into(targets)
        if self._state is not None:
            self._state.read()


def _other_bases(plan: Plan, documents: Location) -> list[str]:
    """Adapters of another base model, by the last part of its name: one model lies in many places."""
    found = []
    for name, here in plan.base_models.items():
        if (documents / name).exists():
            there = _read_document(documents / name).get("base_model_name_or_path")
            if there and _last_part(there) != _last_part(here):
                found.append(f"the adapter in the checkpoint was trained on {there!r}, this one is on {here!r}")
    return found


def _last_part(name: str) -> str:
    return Path(str(name).rstrip("/")).name


def _open(plan: Plan, path: Location, slot: Slot | None) -> OpenFile:
    inner = "" if slot is None or isinstance(path, Url) else str(path.relative_to(slot.paths.image))
    return OpenFile(path, slot.mapping(inner) if slot is not None else None, plan.layouts)


def _assign(plan: Plan, tensors: Location, slot: Slot | None) -> list[tuple[OpenFile, list[Target]]]:
    """Every file with weights, and the targets that it serves; what no file of a folder holds falls to its first one.

    The checkpoint may be split into other files than the plan: another max_shard_size was given when it was saved.
    """
    folders: dict[Location, list[Target]] = {}
    for name, targets in plan.weights.items():
        inner = name.rpartition("/")[0]
        folders.setdefault(tensors / inner if inner else tensors, []).extend(targets)
    assigned = []
    for folder, wanted in folders.items():
        paths: list[Location] = [*folder.glob("*.safetensors")]
        files = [_open(plan, path, slot) for path in sorted(paths, key=str)]
        if not files:
            raise CheckpointError(f"there is no .safetensors file in {folder}")
        served: list[tuple[OpenFile, list[Target]]] = [(file, []) for file in files]
        number = {name: index for index, file in enumerate(files) for name in file.extents}
        for target in wanted:
            served[number.get(target.name, 0)][1].append(target)
        assigned += served
    return assigned


class _OpenState:
    def __init__(self, state: TrainingState, documents: Location, file: OpenFile) -> None:
        self._state = state
        self._file = file
        self._shared = _read_document(documents / DOCUMENT)
        own = documents / local_document(state.rank)
        self._same_world = self._shared.get("world") == state.world
        self._local = _read_document(own) if self._same_world and own.exists() else None
        targets = [make_target(tensor.name, tensor) for tensor in state.tensors]
        self.differences = [
            *state.differences(self._shared),
            *self._file.differences(targets, ignore="rng."),
        ]
        self._targets = [target for target in targets if _is_tensor(target)]

    def read(self) -> None:
        state, file = self._state, self._file
        state.prepare()
        self._file.read_into([target for target in self._targets if _has_room(target)])
        numbers = {each.name: file.tensor(each.name, each.dtype) for each in state.tensors
                   if each.entry.kind == "number"}  # fmt: skip
        rng: dict[str, torch.Tensor] = {}
        if self._same_world:
            rng = {each.generator: file.tensor(each.name, each.dtype) for each in state.rng
                   if each.region.numel and each.name in file.extents}  # fmt: skip
        state.load(self._shared, self._local, numbers, rng)


def _is_tensor(target: Target) -> bool:
    return isinstance(target.shard, StateShard) and target.shard.entry.kind != "number"


def _has_room(target: Target) -> bool:
    """An empty FSDP1 shard has no state, not even the scalars."""
    assert isinstance(target.shard, StateShard)
    parameter = target.shard.source.parameter
    return parameter is not None and parameter in target.shard.optimizer.state


def _read_document(path: Location) -> dict[str, Any]:
    try:
        if not isinstance(path, Url) and path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_DOCUMENT_BYTES} bytes")
        data = path.read_first(MAX_DOCUMENT_BYTES) if isinstance(path, Url) else path.read_bytes()
        return msgspec.json.decode(data, type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
