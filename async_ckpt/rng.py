"""Random number generators of one rank, as small tensors `rng.rank<r>.<generator>`.

They are restored at the same world size only: a rank's stream of random numbers has no meaning for another division
of the data.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from async_ckpt.core.region import Region

from .sharding import Shard

_PYTHON_VERSION = 3  # of random.getstate()
_NUMPY_WORDS = 624


class RngShard(Shard):
    """One generator's state: read anew at each call, copied before `save` returns. It has at least one dimension, so
    that a region of it can be empty."""

    def __init__(self, rank: int, generator: str, read: Callable[[], torch.Tensor], *, mine: bool) -> None:
        sample = read()
        region = Region.whole(tuple(sample.shape)) if mine else Region(False, (0,) * sample.dim(), (0,) * sample.dim())
        super().__init__(f"rng.rank{rank}.{generator}", tuple(sample.shape), sample.dtype, region)
        self.generator = generator
        self._read = read

    @property
    def is_buffer(self) -> bool:
        return True

    def local(self) -> torch.Tensor:
        return self._read()


def rng_shards(rank: int, world: int) -> list[RngShard]:
    """Those of all ranks, since all of them are in the file; only this rank's have a region."""
    return [
        RngShard(each, generator, read, mine=each == rank)
        for each in range(world)
        for generator, read in _readers().items()
    ]


def read_rng() -> dict[str, torch.Tensor]:
    """This process's generators as they are now, as `restore_rng` takes them."""
    return {generator: read() for generator, read in _readers().items()}


def restore_rng(states: dict[str, torch.Tensor]) -> None:
    """`states` by generator, as `RngShard` reads them; a generator that is not in it is left alone."""
    if "python" in states:
        words = [int(word) for word in states["python"].tolist()]
        random.setstate((_PYTHON_VERSION, tuple(words), _from_gauss(states["python_gauss"])))
    if "numpy" in states:
        words = states["numpy"].tolist()
        keys = np.array(words[:_NUMPY_WORDS], dtype=np.uint32)
        np.random.set_state(("MT19937", keys, words[-2], words[-1], float(states["numpy_gauss"])))
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _readers() -> dict[str, Callable[[], torch.Tensor]]:
    return _READERS | ({"cuda": torch.cuda.get_rng_state} if torch.cuda.is_available() else {})


def _python() -> torch.Tensor:
    return torch.tensor(random.getstate()[1], dtype=torch.int64)


def _python_gauss() -> torch.Tensor:
    value = random.getstate()[2]
    return torch.tensor([math.nan if value is None else value], dtype=torch.float64)


def _from_gauss(value: torch.Tensor) -> float | None:
    return None if math.isnan(float(value)) else float(value)


def _numpy_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state(legacy=True)
    return tuple(state)


def _numpy() -> torch.Tensor:
    _, keys, position, has_gauss, _ = _numpy_state()
    return torch.from_numpy(np.concatenate([keys.astype(np.int64), [position, has_gauss]]))


def _numpy_gauss() -> torch.Tensor:
    return torch.tensor([_numpy_state()[4]], dtype=torch.float64)


_READERS: dict[str, Callable[[], torch.Tensor]] = {
    "python": _python,
    "python_gauss": _python_gauss,
    "numpy": _numpy,
    "numpy_gauss": _numpy_gauss,
    "torch": torch.get_rng_state,
}
