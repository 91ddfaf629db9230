"""Optimizer state as named tensors, in the shards in which it lies on this rank.

Tensors are named as torch flattens an optimizer's state_dict: `state.<canonical parameter name>.<key>`
(`torch.distributed.checkpoint.state_dict`, `flatten_optimizer_state_dict=True`), with global shapes, so a checkpoint
can be read at any world size and under any wrapper.

Which keys there will be has to be known before the first step, when there is no state yet. An optimizer is asked by
letting a copy of it step a tiny parameter of its own; what it leaves behind tells the keys, their dtypes, and whether
each is shaped like the parameter or a scalar. Nothing of the real optimizer is touched.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.region import Region

from .plain import from_plain, to_plain
from .sharding import Shard, Watch
from .sharding.dtensor import replicated_local, replicated_zeros, storage_attribute

_PROBE_SIZES = (3, 5, 7, 11, 13)  # no two dimensions alike, so that a transposed or factored state is not mistaken


@dataclass(frozen=True)
class Entry:
    """One key of an optimizer's state.

    "like": a tensor shaped, and sharded, like the parameter. "factored": a whole tensor on every rank, with size 1 in
    all dimensions but `kept` (Adafactor's rows and columns). "scalar": a tensor of one element. "number": Python's.
    """

    kind: Literal["like", "factored", "scalar", "number"]
    dtype: torch.dtype
    kept: tuple[int, ...] = ()

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        if self.kind == "like":
            return parameter
        if self.kind == "factored":
            return tuple(size if dim in self.kept else 1 for dim, size in enumerate(parameter))
        return ()


class NotByElements(Exception):
    """The state of an optimizer is not made of tensors that could be cut and joined like its parameters."""


class StateShard(Shard):
    """One state tensor of one parameter; zeros while the optimizer has none, which is what it would begin with."""

    def __init__(self, parameter: Shard, optimizer: torch.optim.Optimizer, key: str, entry: Entry) -> None:
        shape = entry.shape(parameter.shape)
        region = parameter.region if entry.kind == "like" else Region.whole(shape)
        super().__init__(f"state.{parameter.name}.{key}", shape, entry.dtype, region)
        self.source = parameter
        self.optimizer = optimizer
        self.key = key
        self.entry = entry
        self._value: Any = None
        self._view: torch.Tensor | None = None
        self._pointer = -1
        self._zeros = torch.zeros((), dtype=entry.dtype).expand(region.sizes)

    @property
    def writes(self) -> bool:
        """Whether this rank may save it: a scalar belongs to whoever holds the parameter's element 0."""
        held = self.source.region
        return held.numel > 0 and (self.entry.kind == "like" or not any(held.offsets))

    @property
    def is_settled(self) -> bool:
        return self.source.is_settled

    @property
    def is_state(self) -> bool:
        return True

    def watch(self) -> Watch | None:
        parameter, states = self.source.parameter, self.optimizer.state
        state = states.get(parameter) if parameter is not None else None
        value = None if state is None else state.get(self.key)
        if state is None or not isinstance(value, torch.Tensor):
            return None
        held = ((vars(self.optimizer), "state", states), (state, self.key, value))
        return Watch(value, storage_attribute(value), held, (states,))

    def local(self) -> torch.Tensor:
        parameter = self.source.parameter
        state = self.optimizer.state.get(parameter) if parameter is not None else None
        value = None if state is None else state.get(self.key)
        if value is None:
            return self._zeros
        if self.entry.kind == "number":
            return torch.tensor(value, dtype=self.dtype)
        if self._view is None or value is not self._value or value.data_ptr() != self._pointer:
            self._view = self._make_view(value)
            self._value, self._pointer = value, value.data_ptr()
        return self._view

    def _make_view(self, value: torch.Tensor) -> torch.Tensor:
        if self.entry.kind == "like":
            view = self.source.state_view(value)
        else:
            view = replicated_local(value).detach()
            view = view.reshape(()) if self.entry.kind == "scalar" else view
        if view.dtype is not self.dtype or tuple(view.shape) != self.region.sizes:
            raise CheckpointError(
                f"{self.name!r} is {view.dtype} {list(view.shape)} on this rank, but {self.dtype} "
                f"{list(self.region.sizes)} was expected when async_ckpt was attached: attach again after changing the "
                f"optimizer"
            )
        return view


def state_shards(optimizer: torch.optim.Optimizer, shards: Mapping[str, Shard]) -> list[StateShard]:
    """Every state tensor that the optimizer has or will have, in an order that is the same on every rank.

    Runs no step of the real optimizer, no collective, and allocates nothing on a device. Raises `NotByElements` if
    its state cannot be saved by elements, CheckpointError if it holds a parameter that is not in the model.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    _check_in_model(optimizer, shards)
    probed: dict[object, dict[str, Entry]] = {}
    found: list[StateShard] = []
    tied: set[Hashable] = set()
    for shard in shards.values():
        parameter = shard.parameter
        if parameter is None or id(parameter) not in groups or not parameter.requires_grad or shard.identity in tied:
            continue
        tied.add(shard.identity)  # its state is saved once, under the first of its names
        group = groups[id(parameter)]
        kind = (id(group), parameter.dim(), shard.dtype)
        if kind not in probed:
            probed[kind] = _entries(optimizer, group, parameter.dim(), shard.dtype)
        found += [StateShard(shard, optimizer, key, entry) for key, entry in probed[kind].items()]
    return found


def _check_in_model(optimizer: torch.optim.Optimizer, shards: Mapping[str, Shard]) -> None:
    known = {id(shard.parameter) for shard in shards.values() if shard.parameter is not None}
    strangers = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) not in known and parameter.requires_grad
    ]
    if strangers:
        shapes = ", ".join(str(list(parameter.shape)) for parameter in strangers[:4])
        raise CheckpointError(
            f"the optimizer holds {len(strangers)} parameters that are not in the model (shapes {shapes}): make the "
            f"optimizer after wrapping the model with FSDP or DDP, from the wrapped model's parameters"
        )


def _entries(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], dims: int, dtype: torch.dtype
) -> dict[str, Entry]:
    probe = _probe_state(optimizer, group, dims, dtype)
    entries = {}
    for key, (value, like) in probe.items():
        if isinstance(value, bool | int | float):
            entries[key] = Entry("number", torch.float64 if isinstance(value, float) else torch.int64)
        elif isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(like.shape):
            entries[key] = Entry("like", value.dtype)
        elif isinstance(value, torch.Tensor) and value.numel() == 1:
            entries[key] = Entry("scalar", value.dtype)
        elif isinstance(value, torch.Tensor) and _is_factored(value, like):
            kept = tuple(dim for dim, size in enumerate(value.shape) if size > 1)
            entries[key] = Entry("factored", value.dtype, kept)
        else:
            kind = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(type(value))
            raise NotByElements(f"it keeps {key!r} as {kind} for a parameter of shape {list(like.shape)}")
    return entries


def _is_factored(value: torch.Tensor, like: torch.Tensor) -> bool:
    return value.dim() == like.dim() and all(a in (1, b) for a, b in zip(value.shape, like.shape, strict=True))


def _probe_state(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], dims: int, dtype: torch.dtype
) -> dict[str, tuple[Any, torch.Tensor]]:
    """What this optimizer keeps for a parameter of `dims` dimensions, found by stepping a copy on a tiny one."""
    like = torch.nn.Parameter(torch.ones(_PROBE_SIZES[:dims], dtype=dtype))
    like.grad = torch.ones_like(like)
    clone = copy.copy(optimizer)
    clone.state = defaultdict(dict)
    settings = {name: value for name, value in group.items() if name != "params"}
    # The same state by the plain implementation: the fast ones want a device, or want all of them alike.
    settings |= {name: False for name in ("foreach", "fused", "capturable", "differentiable") if name in settings}
    settings = {name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
                for name, value in settings.items()}  # fmt: skip
    clone.param_groups = [{**settings, "params": [like]}]
    try:
        with torch.enable_grad():
            # The class's own step: a scheduler replaces the instance's by one that counts.
            _plain_step(type(optimizer))(clone)
    except Exception as error:
        raise NotByElements(f"a trial step on a small parameter failed: {error!r}") from error
    return {key: (value, like) for key, value in clone.state.get(like, {}).items()}


def _plain_step(kind: type[torch.optim.Optimizer]) -> Any:
    """`step` without the profiler's wrapper, which would run hooks that are meant for real steps."""
    step: Any = kind.step
    while hasattr(step, "hooked") and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step


class GroupNames:
    """The parameters of each param group by canonical name, sorted; looked up once, since names do not change."""

    def __init__(self, shards: Mapping[str, Shard]) -> None:
        # Several names for what a tied or a flattened parameter holds.
        self._names: dict[int, list[str]] = defaultdict(list)
        for shard in shards.values():
            if shard.parameter is not None:
                self._names[id(shard.parameter)].append(shard.name)
        self._groups: dict[tuple[int, int], list[str]] = {}

    def of(self, group: Mapping[str, Any]) -> list[str]:
        key = (id(group), len(group["params"]))
        if key not in self._groups:
            self._groups[key] = sorted(name for each in group["params"] for name in self._names.get(id(each), []))
        return self._groups[key]


def describe(optimizers: Sequence[torch.optim.Optimizer], names: GroupNames) -> list[dict[str, Any]]:
    """Classes and param groups as JSON, parameters by name. Raises CheckpointError for what JSON cannot hold."""
    described = []
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        groups = [
            {
                "params": names.of(group),
                "settings": {
                    key: to_plain(f"{kind}.param_groups[{index}].{key}", value)
                    for key, value in group.items()
                    if key not in ("params", "param_names")
                },
            }
            for index, group in enumerate(optimizer.param_groups)
        ]
        described.append({"class": kind, "param_groups": groups})
    return described


def check_groups(
    optimizers: Sequence[torch.optim.Optimizer], names: GroupNames, saved: Sequence[Mapping[str, Any]]
) -> list[str]:
    """How the saved param groups differ from these: empty if `load_groups` can follow."""
    if len(saved) != len(optimizers):
        return [f"{len(saved)} optimizers in the checkpoint, {len(optimizers)} here"]
    differences = []
    for optimizer, described in zip(optimizers, saved, strict=True):
        kind = type(optimizer).__name__
        if described["class"] != kind:
            differences.append(f"the optimizer is a {described['class']} in the checkpoint, a {kind} here")
        groups = described["param_groups"]
        here = [names.of(group) for group in optimizer.param_groups]
        if [group["params"] for group in groups] != here:
            counts = [len(group["params"]) for group in groups], [len(group) for group in here]
            differences.append(
                f"the param groups of {kind} hold other parameters: {counts[0]} in the checkpoint, {counts[1]} here"
            )
    return differences


def load_groups(optimizers: Sequence[torch.optim.Optimizer], saved: Sequence[Mapping[str, Any]]) -> None:
    for optimizer, described in zip(optimizers, saved, strict=True):
        for group, stored in zip(optimizer.param_groups, described["param_groups"], strict=True):
            for key, value in stored["settings"].items():
                restored = from_plain(value)
                present = group.get(key)
                if isinstance(present, torch.Tensor):  # a capturable learning rate keeps its place on the device
                    present.fill_(float(restored))
                else:
                    group[key] = restored


def materialise(shards: Sequence[StateShard]) -> None:
    """Give every parameter the state that `shards` describe, as zeros, so that it can be read into.

    As the optimizers do it themselves: like the parameter, with its placements; nothing for an empty FSDP1 shard.
    """
    for shard in shards:
        parameter = shard.source.parameter
        if parameter is None or parameter.numel() == 0:
            continue
        state = shard.optimizer.state[parameter]
        if shard.entry.kind == "like":
            value = state.get(shard.key)
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                state[shard.key] = torch.zeros_like(parameter.detach(), dtype=shard.dtype)
        elif shard.entry.kind == "number":
            state.setdefault(shard.key, 0)
        elif shard.entry.kind == "factored":
            if shard.key not in state:
                state[shard.key] = replicated_zeros(parameter, shard.shape, shard.dtype)
        elif shard.key not in state:
            state[shard.key] = torch.zeros((), dtype=shard.dtype, device=_scalar_device(shard, parameter))


def finish(shards: Sequence[StateShard], numbers: Mapping[str, torch.Tensor]) -> None:
    """Set what is kept as Python numbers, and take back state that the checkpoint's optimizer did not have yet."""
    touched: dict[int, tuple[torch.optim.Optimizer, torch.Tensor]] = {}
    alive: set[int] = set()
    for shard in shards:
        parameter = shard.source.parameter
        if parameter is None or parameter not in shard.optimizer.state:
            continue
        state = shard.optimizer.state[parameter]
        if shard.entry.kind == "number" and shard.name in numbers:
            state[shard.key] = numbers[shard.name].item()
        touched[id(parameter)] = (shard.optimizer, parameter)
        value = state[shard.key]
        if isinstance(value, torch.Tensor):
            # A shard's own elements may all be zero by chance: the step count, where there is one, decides.
            local = shard.local()
            value = bool(local.count_nonzero()) if local.numel() else False
        if value:
            alive.add(id(parameter))
    for key, (optimizer, parameter) in touched.items():
        if key not in alive:
            del optimizer.state[parameter]


def _scalar_device(shard: StateShard, parameter: torch.Tensor) -> torch.device:
    for group in shard.optimizer.param_groups:
        if any(parameter is each for each in group["params"]) and (group.get("capturable") or group.get("fused")):
            return parameter.device
    return torch.device("cpu")
