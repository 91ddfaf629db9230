"""Parameters flattened by FSDP1 (`FullyShardedDataParallel`), with `use_orig_params` True or False.

FSDP1 concatenates a unit's parameters into one flat parameter and cuts that into equal shards, so of each parameter a
rank holds one run of elements, or nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.region import Region

from .names import every_module, require
from .replicated import checked_view, replaced
from .shard import Shard, Watch
from .sources import Sources

_HANDLE_ATTRIBUTES = (
    "flat_param", "uses_sharded_strategy", "reshard", "post_reshard", "_use_orig_params", "_prefetched",
)  # fmt: skip
_FLAT_ATTRIBUTES = (
    "_fqns", "_shapes", "_param_infos", "_shared_param_infos", "_shard_param_infos", "_param_extensions",
    "_contiguities", "_strides", "_params",
)  # fmt: skip
_FLAT_PARAMETER = "_flat_param"  # the name under which FSDP1 registers it when use_orig_params is False


class FlatShard(Shard):
    """The run of a parameter's elements that lies in this rank's shard of the flat parameter.

    Under NO_SHARD, which FSDP1 also falls back to on one process, that is the whole parameter in its own shape.
    """

    def __init__(self, name: str, handle: Any, index: int, module: nn.Module, attribute: str) -> None:
        flat = handle.flat_param
        _check_mappable(name, flat, index)
        shape = tuple(flat._shapes[index])
        part = flat._shard_param_infos[index]
        self._start = part.offset_in_shard if part.in_shard else 0
        self._numel = part.numel_in_shard if part.in_shard else 0
        if not handle.uses_sharded_strategy:
            region = Region.whole(shape)
        else:
            region = Region.run(part.intra_param_start_idx if part.in_shard else 0, self._numel)
        super().__init__(name, shape, _sharded(flat).dtype, region)
        self._handle = handle
        self._flat = flat
        self._flat_numel = flat._sharded_size.numel()
        # None without original parameters: then the module has views, made anew in each forward.
        self._originals: list[torch.Tensor] | None = flat._params
        self._index = index
        self._module = module
        self._attribute = attribute
        self._view: torch.Tensor | None = None
        self._pointer = 0

    @property
    def identity(self) -> Hashable:
        return id(self._flat), self._index

    @property
    def uses_orig_params(self) -> bool:
        """Whether the module still has a Parameter under this name (`use_orig_params=True`)."""
        return bool(self._handle._use_orig_params)

    @property
    def is_settled(self) -> bool:
        """The first forward moves the shard out of the flat parameter."""
        return not self._handle.uses_sharded_strategy or hasattr(self._flat, "_local_shard")

    @property
    def parameter(self) -> torch.Tensor:
        parameter: torch.Tensor = self._flat._params[self._index] if self.uses_orig_params else self._flat
        return parameter

    def state_view(self, state: torch.Tensor) -> torch.Tensor:
        flat = state.detach().reshape(-1)
        if not self.uses_orig_params:
            flat = flat[self._start : self._start + self._numel]
        return flat.view(self.region.sizes)

    def watch(self) -> Watch:
        flat, place = self._flat, (self._module._parameters, self._attribute)
        held: list[tuple[dict[Any, Any], Hashable, object]] = [(vars(self._handle), "flat_param", flat)]
        if self._originals:
            held.append((*place, self._originals[self._index]))
        settled = hasattr(flat, "_local_shard")
        return Watch(flat, "_local_shard" if settled else None, tuple(held))

    def local(self) -> torch.Tensor:
        flat = self._flat
        registered = self._module._parameters.get(self._attribute)
        if registered is not None and self._originals and registered is not self._originals[self._index]:
            self._check_computing(registered)
        sharded = _sharded(flat)
        if self._view is None or sharded.data_ptr() != self._pointer or sharded.dtype is not self.dtype:
            self._view = self._make_view(sharded)
            self._pointer = sharded.data_ptr()
        return self._view

    def _check_computing(self, registered: torch.Tensor) -> None:
        """Raise unless `registered` is what FSDP1 itself puts in its place to compute with: a plain view."""
        if isinstance(registered, nn.Parameter):
            raise replaced(self.name)

    def _make_view(self, sharded: torch.Tensor) -> torch.Tensor:
        if self._handle.flat_param is not self._flat:
            raise replaced(self.name)
        if sharded.numel() != self._flat_numel:
            raise CheckpointError(
                f"the FSDP1 unit of {self.name!r} has a shard of {sharded.numel()} elements, expected "
                f"{self._flat_numel}: it is in the middle of a forward that failed; run a whole one first"
            )
        run = sharded.detach()[self._start : self._start + self._numel]
        return checked_view(self, run.view(self.region.sizes))


def sources(model: nn.Module) -> Sources:
    """Every original parameter of every FSDP1 unit, by the module and the attribute that it had before wrapping.

    Raises CheckpointError if this torch lacks what is needed to find them.
    """
    found: Sources = {}
    for handle in _handles(every_module(model)):
        flat = handle.flat_param
        places = [(info.module, info.param_name) for info in flat._param_infos]
        indices = {place: index for index, place in enumerate(places)}
        for info in flat._shared_param_infos:
            indices[info.module, info.param_name] = indices[info.prim_module, info.prim_param_name]
        for (module, attribute), index in indices.items():
            found.setdefault(module, {})[attribute] = partial(
                FlatShard, handle=handle, index=index, module=module, attribute=attribute
            )
    return found


def reshard(modules: Iterable[nn.Module]) -> None:
    """Make every FSDP1 unit among `modules` free its unsharded flat parameter. Runs no collective.

    The root unit keeps its unsharded copy after a forward, and gathers no new one while it has it.
    """
    for handle in _handles(modules):
        # Before the first forward there is no copy; NO_SHARD computes with the flat parameter itself.
        if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):
            handle.reshard(True)
            handle.post_reshard()
            handle._prefetched = False


def is_flat_parameter(attribute: str, parameter: torch.Tensor) -> bool:
    """Whether FSDP1 registered this as the concatenation of a unit's parameters: no tensor of the model."""
    return attribute == _FLAT_PARAMETER and bool(getattr(parameter, "_is_flat_param", False))


def _handles(modules: Iterable[nn.Module]) -> Iterator[Any]:
    for module in modules:
        if isinstance(module, FullyShardedDataParallel):
            require(module, "FullyShardedDataParallel", ("_handle",))
            handle = module._handle
            if handle is not None:  # None: a unit whose parameters all belong to units below it
                require(handle, "FlatParamHandle", _HANDLE_ATTRIBUTES)
                require(handle.flat_param, "FlatParameter", _FLAT_ATTRIBUTES)
                yield handle


def _sharded(flat: Any) -> torch.Tensor:
    """This rank's shard of the flat parameter: full precision, padding included.

    Once the first forward has set `_local_shard`, the flat parameter itself may be the unsharded one at any time.
    """
    sharded: torch.Tensor = getattr(flat, "_local_shard", flat)
    return sharded


def _check_mappable(name: str, flat: Any, index: int) -> None:
    if flat._param_extensions[index] is not None:
        raise CheckpointError(
            f"{name!r} is sharded by FSDP1 on top of tensor parallelism, which async_ckpt cannot map to elements of "
            "the tensor; use FSDP2 (fully_shard) with tensor parallelism"
        )
    if not flat._contiguities[index] and not _is_row_major(flat._shapes[index], flat._strides[index]):
        raise CheckpointError(
            f"{name!r} was not contiguous when FSDP1 flattened it, so its shards are no runs of its elements; "
            "call .contiguous() on it before wrapping the model"
        )


def _is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements lie in order. The stride of a dimension of size 1 says nothing, but FSDP1 minds it: OLoRA of
    rank 1 has such tensors, which `contiguous()` does not change."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
