"""Where shards lie now: asked at each save, without a Python call a tensor while nothing has moved."""

from __future__ import annotations

import operator
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .sharding import Shard

Trusted = list[tuple[list[torch.Tensor], list[int]]]

_address: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr


class Lookup:
    """The local tensors of `shards`, in their order.

    `views` may be called in the training thread while `check` runs in another one. Whatever grows with the number of
    tensors runs inside C functions (`map` over methods and getters): a loop in Python would cost the training thread
    its time, and a loop in another thread would take the GIL from it.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._lock = threading.Lock()
        self._look()

    def views(self, *, exact: bool = True) -> list[torch.Tensor]:
        """The shards' storage as it is now; the same list until one of them has moved. The views keep the storage
        alive: a copy reads what was there even if `p.data = ...` or `model.to` moves the parameter afterwards.

        Not `exact`: where torch swaps tensors to move them, their objects are compared and not their addresses, which
        takes a fifth of the time. Then ask `moved(lookup.trusted)` before relying on them.
        Raises CheckpointError if one has moved because it was replaced or converted.
        """
        # What cannot be watched may be computed anew at each look.
        if not self._watched or self._have_moved(exact):
            with self._lock:
                self._look()
        return self._views

    @property
    def trusted(self) -> Trusted:
        """What `views(exact=False)` has relied on: tensors, and where they lay when last looked at."""
        return self._trusted

    def check(self) -> bool:
        """Whether the model holds what it did when last looked at. If not, everything is looked up anew.

        Raises CheckpointError if a parameter was replaced.
        """
        with self._lock:
            if self._watched and self._same():
                return True
            self._look()
            return False

    def _same(self) -> bool:
        return all(map(operator.is_, map(dict.get, self._holders, self._keys), self._held)) and all(
            map(_same_objects, map(list, map(dict.values, self._dicts)), self._values)
        )

    def _have_moved(self, exact: bool) -> bool:
        for get, owners, tensors in self._swapping:
            # A copied list touches all its objects at once, so that the CPU fetches them side by side and not one
            # behind the other: half of the time.
            _, _ = owners[:], tensors[:]
            if not all(map(operator.is_, map(get, owners), tensors)):
                return True
        if exact and moved(self._trusted):
            return True
        return self._addresses() != self._expected

    def _addresses(self) -> list[list[int]]:
        return [list(map(_address, owners if get is None else map(get, owners))) for get, owners in self._staying]

    def _look(self) -> None:
        watches = [watch for watch in (shard.watch() for shard in self._shards) if watch is not None]
        by_kind: dict[tuple[str | None, bool], dict[int, Any]] = defaultdict(dict)
        for watch in watches:
            by_kind[watch.attribute, watch.swaps][id(watch.owner)] = watch.owner
        getters = {name: None if name is None else operator.attrgetter(name) for name, _ in by_kind}
        entries = {(id(holder), id(key)): (holder, key, held) for watch in watches for holder, key, held in watch.held}
        self._staying = [(getters[name], list(of.values())) for (name, swaps), of in by_kind.items() if not swaps]
        swapping = [(getters[name], list(of.values())) for (name, swaps), of in by_kind.items() if swaps]
        self._swapping = [(get, owners, list(map(get, owners))) for get, owners in swapping if get is not None]
        # Before the views: what moves in between is noticed next time.
        self._expected = self._addresses()
        self._trusted = [(tensors, list(map(_address, tensors))) for _, _, tensors in self._swapping]
        self._views = [shard.local() for shard in self._shards]
        self._watched = len(watches) == len(self._shards)
        self._holders = [holder for holder, _, _ in entries.values()]
        self._keys = [key for _, key, _ in entries.values()]
        self._held = [held for _, _, held in entries.values()]
        self._dicts = list({id(each): each for watch in watches for each in watch.whole}.values())
        self._values = [list(each.values()) for each in self._dicts]


def moved(trusted: Trusted) -> bool:
    """Whether one of these tensors lies elsewhere now. Two thirds of the time are cache misses."""
    return any(list(map(_address, tensors)) != addresses for tensors, addresses in trusted)


def _same_objects(found: list[object], expected: list[object]) -> bool:
    return len(found) == len(expected) and all(map(operator.is_, found, expected))
