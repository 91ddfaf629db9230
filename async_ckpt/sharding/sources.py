"""What a wrapper's module reports: how to make the Shard of each parameter that the wrapper manages."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .shard import Shard

# Module -> attribute -> (canonical name -> Shard). A module may be reachable by several names, hence the callable.
Sources = dict[nn.Module, dict[str, Callable[[str], Shard]]]
