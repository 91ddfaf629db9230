"""All that a run needs besides its weights to go on as if it had not stopped: optimizers, scheduler, gradient scaler,
random numbers, and any other object with a state_dict.

Tensors that are sharded like parameters lie in `training_state.safetensors`; the rest is JSON, the same for every rank
in `training_state.json`, of one rank in `rank-<r>.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec
import torch

from async_ckpt.core.errors import CheckpointError

from .optimizer_state import (
    GroupNames,
    NotByElements,
    StateShard,
    check_groups,
    describe,
    finish,
    load_groups,
    materialise,
    state_shards,
)
from .plain import from_plain, to_plain
from .rng import RngShard, restore_rng, rng_shards
from .sharding import Shard

log = logging.getLogger(__name__)

FOLDER = "training_state"
TENSORS_FILE = f"{FOLDER}/training_state.safetensors"
DOCUMENT = f"{FOLDER}/training_state.json"
FORMAT = 1

Documents = Callable[[], dict[str, bytes]]


class Stateful(Protocol):
    """A scheduler, a GradScaler, a StatefulDataLoader."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass(frozen=True)
class Parts:
    """What the user gave to attach. `shared` is the same on every rank, `local` belongs to one."""

    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    shared: Mapping[str, Stateful] = field(default_factory=dict)
    local: Mapping[str, Stateful] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.optimizers or self.shared or self.local)


class TrainingState:
    """The training state of one rank; `tensors` are what goes into the image, `rng` those of all ranks."""

    def __init__(self, parts: Parts, shards: Mapping[str, Shard], *, rank: int, world: int) -> None:
        """Raises CheckpointError for what could not be saved, before anything is."""
        self.rank = rank
        self.world = world
        self.tensors: list[StateShard] = []
        self.rng: list[RngShard] = rng_shards(rank, world)
        saved = []
        for optimizer in parts.optimizers:
            try:
                self.tensors += state_shards(optimizer, shards)
                saved.append(optimizer)
            except NotByElements as error:
                log.warning("the state of %s is not saved, and will begin anew after a restart: %s",
                            type(optimizer).__name__, error)  # fmt: skip
        self._parts = replace(parts, optimizers=tuple(saved))
        self._names = GroupNames(shards)
        self.snapshot()()

    def snapshot(self) -> Documents:
        """Take what JSON holds as it is now; the encoding is left to whoever calls the result."""
        parts, rank = self._parts, self.rank
        shared: dict[str, Any] = {}
        if rank == 0:
            shared = {
                "format": FORMAT,
                "world": self.world,
                "optimizers": describe(parts.optimizers, self._names),
                **{name: to_plain(name, each.state_dict()) for name, each in parts.shared.items()},
            }
        local = {name: to_plain(f"stateful.{name}", each.state_dict()) for name, each in parts.local.items()}

        def encode() -> dict[str, bytes]:
            documents = {DOCUMENT: msgspec.json.encode(shared)} if shared else {}
            if local:
                documents[local_document(rank)] = msgspec.json.encode({"format": FORMAT, "stateful": local})
            return documents

        return encode

    def differences(self, shared: Mapping[str, Any]) -> list[str]:
        """What in the checkpoint's document does not fit; empty if `load` can follow."""
        found = check_groups(self._parts.optimizers, self._names, shared.get("optimizers", []))
        found += [f"the checkpoint holds no {name}" for name in self._parts.shared if name not in shared]
        return found

    def prepare(self) -> None:
        """Make room in the optimizers for what is read next."""
        materialise(self.tensors)

    def load(
        self,
        shared: Mapping[str, Any],
        local: Mapping[str, Any] | None,
        numbers: Mapping[str, torch.Tensor],
        rng: dict[str, torch.Tensor],
    ) -> None:
        """After the tensors have been read: settings, numbers, schedulers; at last the random numbers."""
        load_groups(self._parts.optimizers, shared.get("optimizers", []))
        finish(self.tensors, numbers)
        for name, each in self._parts.shared.items():
            each.load_state_dict(from_plain(shared[name]))
        own = local["stateful"] if local is not None else {}
        for name, each in self._parts.local.items():
            if name in own:
                each.load_state_dict(from_plain(own[name]))
        restore_rng(rng)


def make_parts(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    scheduler: Stateful | None,
    scaler: Stateful | None,
    stateful: Mapping[str, Stateful] | None,
) -> Parts:
    """Raises CheckpointError naming what has no state_dict to save."""
    given = () if optimizer is None else (optimizer,) if not isinstance(optimizer, list | tuple) else tuple(optimizer)
    optimizers = tuple(_inner(each) for each in given)
    for each in optimizers:
        if not isinstance(each, torch.optim.Optimizer):
            raise CheckpointError(
                f"optimizer is a {type(each).__name__}: give a torch.optim.Optimizer, or a list of them"
            )
    shared = {name: each for name, each in (("scheduler", scheduler), ("scaler", scaler)) if each is not None}
    if stateful is not None and not isinstance(stateful, Mapping):
        raise CheckpointError(f"stateful is a {type(stateful).__name__}: give a dict, as in {{'dataloader': loader}}")
    local = dict(stateful or {})
    for name, each in {**shared, **local}.items():
        if not hasattr(each, "state_dict") or not hasattr(each, "load_state_dict"):
            raise CheckpointError(f"{name} is a {type(each).__name__} without state_dict() and load_state_dict()")
    return Parts(optimizers, shared, local)


def local_document(rank: int) -> str:
    return f"{FOLDER}/rank-{rank}.json"


def _inner(optimizer: Any) -> Any:
    """accelerate's wrapper keeps the real one inside; the state lies there."""
    while not type(optimizer).__module__.startswith("torch.") and isinstance(
        getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = optimizer.optimizer
    return optimizer
