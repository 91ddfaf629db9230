"""Tensors that lie whole on every rank: an unwrapped model, DDP, parameters that FSDP ignores, buffers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import nn

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.region import Region

from .shard import Shard, Watch


class ReplicatedShard(Shard):
    """A parameter that this rank holds whole."""

    def __init__(self, name: str, module: nn.Module, attribute: str, parameter: torch.Tensor) -> None:
        if hasattr(parameter, "ds_tensor"):
            raise CheckpointError(
                f"parameter {name!r} is partitioned by DeepSpeed ZeRO-3, which async_ckpt does not support yet; "
                "use FSDP, or ZeRO stage 1 or 2"
            )
        shape = tuple(parameter.shape)
        super().__init__(name, shape, parameter.dtype, Region.whole(shape))
        self._module = module
        self._attribute = attribute
        self._parameter = parameter
        self._view: torch.Tensor | None = None
        self._pointer = 0

    @property
    def identity(self) -> Hashable:
        return _place(self._parameter)

    @property
    def parameter(self) -> torch.Tensor:
        return self._parameter

    def watch(self) -> Watch:
        return Watch(self._parameter, None, ((self._module._parameters, self._attribute, self._parameter),))

    def local(self) -> torch.Tensor:
        parameter = self._parameter
        if self._module._parameters.get(self._attribute) is not parameter:
            raise replaced(self.name)
        # The dtype is compared each time: an empty tensor's address says nothing.
        if self._view is None or parameter.data_ptr() != self._pointer or parameter.dtype is not self.dtype:
            self._view = checked_view(self, parameter)
            self._pointer = self._view.data_ptr()  # not the parameter's: it may move while another thread is here
        return self._view


class BufferShard(Shard):
    """A persistent buffer, which `holder` has as `key`: a module's `_buffers`, or another dict that a module keeps.

    Modules may bind a new tensor to it in any forward, so it is looked up at each call.
    """

    def __init__(self, name: str, holder: Mapping[str, torch.Tensor | None], key: str, buffer: torch.Tensor) -> None:
        shape = tuple(buffer.shape)
        super().__init__(name, shape, buffer.dtype, Region.whole(shape))
        self._holder = holder
        self._key = key
        self._view: torch.Tensor | None = None
        self._source: torch.Tensor | None = None
        self._pointer = 0

    @property
    def identity(self) -> Hashable:
        return _place(self._holder.get(self._key))

    @property
    def is_buffer(self) -> bool:
        return True

    def local(self) -> torch.Tensor:
        buffer = self._holder.get(self._key)
        if buffer is None:
            raise replaced(self.name)
        if (
            self._view is None
            or buffer is not self._source
            or buffer.data_ptr() != self._pointer
            or buffer.dtype is not self.dtype
        ):
            self._view = checked_view(self, buffer)
            self._source = buffer
            self._pointer = buffer.data_ptr()
        return self._view


def checked_view(shard: Shard, local: torch.Tensor) -> torch.Tensor:
    """`local` detached. Raises CheckpointError unless it has the dtype and the shape that `shard` promised."""
    if local.dtype is not shard.dtype:
        raise CheckpointError(
            f"{shard.name!r} had dtype {shard.dtype} when async_ckpt was attached and has {local.dtype} now; "
            "convert the model before attach(), or attach again"
        )
    if tuple(local.shape) != shard.region.sizes:
        raise CheckpointError(
            f"{shard.name!r} had local shape {shard.region.sizes} when async_ckpt was attached and has "
            f"{tuple(local.shape)} now; attach again after changing the model"
        )
    return local.detach()


def _place(tensor: torch.Tensor | None) -> Hashable:
    """Tensors are also tied by sharing their storage, without being the same object."""
    if tensor is None or tensor.is_meta or tensor.numel() == 0 or type(tensor.detach()) is not torch.Tensor:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def replaced(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name!r} is no longer the tensor that async_ckpt was attached to: something put another one in its place "
        "(wrapped by fully_shard or FSDP after attach; load_state_dict(assign=True); an adapter that was deleted and "
        "added again): wrap the model first; else attach again, and make the "
        "optimizer anew too, since it still updates the old one"
    )
