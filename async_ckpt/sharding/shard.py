"""The one type that every wrapper's module produces: a global tensor and the part of it that lies on this rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from async_ckpt.core.region import Region

if TYPE_CHECKING:
    import torch


class Watch(NamedTuple):
    """What has to stay as it is for `Shard.local` to stay what it was.

    The address of `owner`, or of the tensor that it has as `attribute`, tells whether the storage has moved. `held`
    are dicts, keys in them, and the values that they have to hold: else something was replaced. `whole` are dicts whose
    values all have to stay, for those whose keys are tensors: these hash in Python. `swaps`: whatever torch does that
    moves the storage puts another tensor into `attribute`, so while that is the same object nothing has moved.
    """

    owner: Any
    attribute: str | None
    held: tuple[tuple[dict[Any, Any], Hashable, object], ...]
    whole: tuple[dict[Any, Any], ...] = ()
    swaps: bool = False


@dataclass(frozen=True)
class Shard(ABC):
    """Guarantee: `local()` never communicates and never allocates device memory.

    `name` is canonical: the parameter's or buffer's path in the unwrapped model. `shape` and `dtype` are the global
    tensor's. `region` is what this rank holds (`region.numel == 0`: nothing).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    region: Region

    @abstractmethod
    def local(self) -> torch.Tensor:
        """The local storage as it is now, detached, of shape `region.sizes`; writes to it reach the model.

        Cheap enough to be called for every tensor at every save: the same object is returned until the storage moves.
        Valid until the next optimizer step. Raises CheckpointError if the parameter was replaced since attach.
        """

    def watch(self) -> Watch | None:
        """How to notice that `local()` would give another tensor; None if only `local()` can tell."""
        return None

    @property
    def is_state(self) -> bool:
        """True for an optimizer's state, of which a step or `load_state_dict` may make new tensors."""
        return False

    @property
    def identity(self) -> Hashable:
        """Equal for the names of one tied tensor, different for different tensors. It says so within one process."""
        return id(self)

    @property
    def parameter(self) -> torch.Tensor | None:
        """What an optimizer holds for this tensor: the sharded parameter, FSDP1's flat one; None for a buffer."""
        return None

    def state_view(self, state: torch.Tensor) -> torch.Tensor:
        """This tensor's part of `state`, an optimizer's tensor shaped like `parameter`: of shape `region.sizes`."""
        return state.detach()

    @property
    def is_settled(self) -> bool:
        """Whether `local()` may be called from another thread than the one that trains."""
        return True

    @property
    def is_buffer(self) -> bool:
        """True for a buffer: it may change in any forward, so it is copied before `save` returns; rank 0 writes it."""
        return False
