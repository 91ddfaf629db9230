"""Tensors sharded as DTensors: FSDP2 (`fully_shard`), HSDP, tensor parallelism, and their combinations."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.region import Region

from .names import every_module, require
from .replicated import checked_view, replaced
from .shard import Shard, Watch
from .sources import Sources

_STATE_ATTRIBUTES = ("_get_fsdp_state",)
_GROUP_ATTRIBUTES = ("fsdp_params",)
_PARAMETER_ATTRIBUTES = ("_module_info", "sharded_param", "to_sharded")
# Mesh -> global shape and placements -> the pieces of such a tensor on this rank.
_chunks: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()
_INFO_ATTRIBUTES = ("module", "param_name", "shared_modules", "shared_param_names")
_DTENSOR_ATTRIBUTES = ("_local_tensor", "__create_chunk_list__")


class DTensorShard(Shard):
    """The box of a DTensor that this rank holds.

    `managed` is FSDP2's record of the parameter, None for a DTensor that no FSDP manages. While FSDP2 has a parameter
    unsharded, the module holds another, full-size and possibly lower-precision one; the sharded parameter stays the
    truth, so it is what is kept here.
    """

    def __init__(self, name: str, module: nn.Module, attribute: str, parameter: DTensor, managed: Any = None) -> None:
        require(parameter, "DTensor", _DTENSOR_ATTRIBUTES)
        local = parameter._local_tensor
        super().__init__(name, tuple(parameter.shape), local.dtype, _region(name, parameter))
        self._module = module
        self._attribute = attribute
        self._parameter: Any = parameter  # registered as a Parameter and at the same time a DTensor
        self._managed = managed
        self._local: Any = None
        self._view: torch.Tensor | None = None
        self._pointer = 0

    @property
    def identity(self) -> Hashable:
        return id(self._parameter)

    @property
    def parameter(self) -> torch.Tensor:
        parameter: torch.Tensor = self._parameter
        return parameter

    def state_view(self, state: torch.Tensor) -> torch.Tensor:
        return state._local_tensor.detach() if isinstance(state, DTensor) else state.detach()

    def watch(self) -> Watch:
        held = ((self._module._parameters, self._attribute, self._parameter),)
        return Watch(self._parameter, "_local_tensor", held, swaps=True)

    def local(self) -> torch.Tensor:
        parameter = self._parameter
        registered = self._module._parameters.get(self._attribute)
        if registered is not parameter:
            self._check_unsharded(registered)
        local: torch.Tensor = parameter._local_tensor
        if (
            self._view is None
            or local is not self._local
            or local.data_ptr() != self._pointer
            or local.dtype is not self.dtype
        ):
            self._view = checked_view(self, local)
            self._local = local
            self._pointer = local.data_ptr()
        return self._view

    def _check_unsharded(self, registered: torch.Tensor | None) -> None:
        """Raise unless the module holds what FSDP2 itself puts in the sharded parameter's place for a while."""
        managed = self._managed
        if (
            managed is None
            or registered is None
            or managed.sharded_param is not self._parameter
            or (
                registered is not getattr(managed, "_unsharded_param", None)
                and registered is not getattr(managed, "_sharded_post_forward_param", None)
            )
        ):
            raise replaced(self.name)


def sources(model: nn.Module) -> Sources:
    """Every parameter that `fully_shard` manages, by the module and the attribute that it is registered as.

    Raises CheckpointError if this torch lacks what is needed to find them.
    """
    found: Sources = {}
    for group in _groups(model):
        require(group, "FSDPParamGroup", _GROUP_ATTRIBUTES)
        for managed in group.fsdp_params:
            require(managed, "FSDPParam", _PARAMETER_ATTRIBUTES)
            info = managed._module_info
            require(info, "ParamModuleInfo", _INFO_ATTRIBUTES)
            places = [(info.module, info.param_name)]
            places += zip(info.shared_modules, info.shared_param_names, strict=True)
            for module, attribute in places:
                found.setdefault(module, {})[attribute] = partial(
                    DTensorShard,
                    module=module,
                    attribute=attribute,
                    parameter=managed.sharded_param,
                    managed=managed,
                )
    return found


def reshard(modules: Iterable[nn.Module]) -> None:
    """Make every `fully_shard`ed one of `modules` free its unsharded parameters. Runs no collective."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def storage_attribute(tensor: torch.Tensor) -> str | None:
    """Where a tensor keeps the one that has storage: None if that is itself."""
    return "_local_tensor" if isinstance(tensor, DTensor) else None


def replicated_local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor that lies whole on every rank."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def replicated_zeros(parameter: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that lie whole on every rank; on the parameter's mesh if it is a DTensor. Runs no collective."""
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    local = torch.zeros(shape, dtype=dtype, device=parameter._local_tensor.device)
    mesh = parameter.device_mesh
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before `fully_shard` gave it one of its own, named after it with "FSDP" in front."""
    classes = type(module).__mro__
    if isinstance(module, FSDPModule):
        classes = classes[classes.index(FSDPModule) + 1 :]
    return next(cls for cls in classes if issubclass(cls, nn.Module))


def _groups(model: nn.Module) -> Iterator[Any]:
    for module in every_module(model):
        if not isinstance(module, FSDPModule):
            continue
        require(module, "FSDPModule", _STATE_ATTRIBUTES)
        state = module._get_fsdp_state()
        if hasattr(state, "_fsdp_param_groups"):
            yield from state._fsdp_param_groups
        else:  # older versions of torch: one group at most
            require(state, "FSDPState", ("_fsdp_param_group",))
            if state._fsdp_param_group is not None:
                yield state._fsdp_param_group


def _region(name: str, parameter: DTensor) -> Region:
    # Layers are alike, and to ask torch takes longer than all else that is done for a parameter.
    known = _chunks.setdefault(parameter.device_mesh, {})
    key = (tuple(parameter.shape), tuple(parameter.placements))
    if key not in known:
        known[key] = parameter.__create_chunk_list__()  # type: ignore[no-untyped-call]
    chunks = known[key]
    sizes = tuple(parameter._local_tensor.shape)
    if len(chunks) != 1 or tuple(chunks[0].sizes) != sizes:
        raise CheckpointError(
            f"{name!r} has placements {parameter.placements}, under which this rank holds {len(chunks)} pieces, not "
            f"one box of shape {sizes}; async_ckpt cannot describe that, use other placements"
        )
    return Region(False, tuple(int(offset) for offset in chunks[0].offsets), sizes)
