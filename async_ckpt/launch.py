"""What starts the copies of a batch on a device: one call a tensor, or one launch of a graph of them all.

The batch of a slot stays the same object until a tensor has moved. What becomes of it:

    copied tensor by tensor -> copied so once more -> a graph is built, behind that save, in the staging thread
    -> launched at every save, until the batch is another one, which begins anew.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from .batch import Batch
from .cudart import Graphs

log = logging.getLogger(__name__)

GRAPH_VARIABLE = "ASYNC_CKPT_CUDA_GRAPH"  # "1": not the default before it has run on a GPU
_COPIES_BEFORE = 2  # a batch that is new at every save never gets a graph
_MIN_COPIES = 16  # fewer are started about as fast one by one

_address: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr

G = TypeVar("G")


class Target(Protocol):
    """A slot, as far as it counts here."""

    index: int

    def is_pinned(self, view: torch.Tensor) -> bool: ...


@dataclass
class _Use(Generic[G]):
    batch: Batch
    slot: Target
    copies: int = 0
    refused: bool = False
    graph: G | None = None


class Uses(Generic[G]):
    """Which batches have a graph, which are to get one, and which graphs have no batch any more. Knows nothing of CUDA.
    The training thread asks, the staging thread builds."""

    def __init__(self) -> None:
        self.given_up = False
        self._lock = threading.Lock()
        self._uses: dict[Hashable, _Use[G]] = {}
        self._retired: list[G] = []

    def graph_for(self, key: Hashable, slot: Target, batch: Batch) -> G | None:
        """The graph by which to copy `batch` now; None: tensor by tensor, which is counted."""
        with self._lock:
            if self.given_up:
                return None
            use = self._uses.get(key)
            if use is None or use.batch is not batch:
                self._retire(use)
                use = self._uses[key] = _Use(batch, slot)
            if use.graph is None:
                use.copies += 1
            return use.graph

    def due(self) -> list[tuple[Hashable, Target, Batch]]:
        """Batches that are to get a graph."""
        with self._lock:
            return [(key, use.slot, use.batch) for key, use in self._uses.items()
                    if use.graph is None and not use.refused and use.copies >= _COPIES_BEFORE]  # fmt: skip

    def built(self, key: Hashable, batch: Batch, graph: G | None) -> None:
        """`graph` copies `batch`; None: it is not worth one."""
        with self._lock:
            use = self._uses.get(key)
            if use is not None and use.batch is batch:
                use.graph, use.refused = graph, graph is None
            elif graph is not None:  # another batch has come meanwhile, or all was given up
                self._retired.append(graph)

    def drop(self, key: Hashable) -> None:
        """What is known of this key does not hold any more."""
        with self._lock:
            self._retire(self._uses.pop(key, None))

    def retired(self) -> list[G]:
        """Graphs that will not be launched again; each is returned once."""
        with self._lock:
            retired, self._retired = self._retired, []
            return retired

    def give_up(self) -> bool:
        """From now on every copy is made tensor by tensor. False if that was so already."""
        with self._lock:
            first, self.given_up = not self.given_up, True
            for use in self._uses.values():
                self._retire(use)
            self._uses.clear()
            return first

    def _retire(self, use: _Use[G] | None) -> None:
        if use is not None and use.graph is not None:
            self._retired.append(use.graph)


@dataclass(frozen=True)
class _Built:
    """`graph` copies what lay at `addresses` when it was built, `sources`; `rest` it does not copy."""

    graph: Any
    sources: list[torch.Tensor]
    addresses: list[int]
    rest: Batch = field(default_factory=lambda: ([], []))


class Launcher:
    """Starts copies on devices. Guarantee: every byte of a batch is copied from where it lies at the call. Whatever
    fails with graphs ends them, with one warning, and all is copied tensor by tensor as if there were none."""

    def __init__(self, graphs: Graphs | None, copy: Callable[[Batch], None]) -> None:
        self._graphs = graphs
        self._copy = copy
        self._uses: Uses[_Built] = Uses()

    def start(self, slot: Target | None, device: torch.device, batch: Batch, stream: int) -> None:
        """Queue the copy of `batch` on the current stream, which is `stream`. `slot` None: this batch will not come
        again."""
        built = None
        key = None if slot is None else (slot.index, device)
        # If the training is being captured, what is queued here becomes part of that; and it may be replayed as it is.
        if slot is not None and self._graphs is not None and not torch.cuda.is_current_stream_capturing():
            built = self._uses.graph_for(key, slot, batch)
        if built is not None and not self._launch(key, built, stream):
            built = None
        rest = batch if built is None else built.rest
        if rest[0]:
            self._copy(rest)

    def _launch(self, key: Hashable, built: _Built, stream: int) -> bool:
        # The batch is the same object, so nothing should have moved; but a graph reads addresses, not tensors.
        if list(map(_address, built.sources)) != built.addresses:
            self._uses.drop(key)
            return False
        try:
            built.graph.launch(stream)
        except Exception as error:
            self._give_up(error)
            return False
        return True

    def settle(self) -> None:
        """Build what is due, free what is not wanted any more. Called in the staging thread, when a copy has ended."""
        if self._graphs is None:
            return
        try:
            self._free()
            for key, slot, batch in self._uses.due():
                self._uses.built(key, batch, _build(self._graphs, slot, batch))
        except Exception as error:
            self._give_up(error)

    def adopt_thread(self, device: torch.device) -> None:
        """Make this thread one that disturbs nobody's capture, and has no context on a device but `device`."""
        try:
            torch.cuda.set_device(device)
            if self._graphs is not None:
                self._graphs.relax_this_thread()
        except Exception as error:
            log.debug("the staging thread stays as it is: %s", error)

    def close(self) -> None:
        """Free all graphs. No copy may be under way."""
        try:
            self._uses.give_up()
            self._free()
        except Exception as error:
            log.debug("CUDA graphs are left behind: %s", error)

    def _free(self) -> None:
        for built in self._uses.retired():
            built.graph.close()

    def _give_up(self, error: Exception) -> None:
        if self._uses.give_up():
            log.warning("copies to the host are started tensor by tensor from now on, which takes some milliseconds of "
                        "a save: %s. Without %s=1 it is so from the beginning", error, GRAPH_VARIABLE)  # fmt: skip


def graphs_wanted() -> bool:
    return os.environ.get(GRAPH_VARIABLE) == "1"


def _build(graphs: Graphs, slot: Target, batch: Batch) -> _Built | None:
    """None if there is too little that a graph can copy."""
    pairs = [(target, source) for target, source in zip(*batch, strict=True) if source.numel()]
    fit = [pair for pair in pairs if _is_plain(*pair) and slot.is_pinned(pair[0])]
    if len(fit) < _MIN_COPIES:
        return None
    chosen = {id(target) for target, _ in fit}
    rest = [pair for pair in pairs if id(pair[0]) not in chosen]
    sources = [source for _, source in fit]
    addresses = list(map(_address, sources))
    # Bytes of the target: whatever becomes of a source meanwhile, nothing is written behind its target.
    copies = [(target.data_ptr(), address, target.nbytes) for (target, _), address in zip(fit, addresses, strict=True)]
    graph = graphs.build(sources[0].device, copies)
    return _Built(graph, sources, addresses, ([target for target, _ in rest], [source for _, source in rest]))


def _is_plain(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the copy is one of bytes. For all others torch allocates memory on the device and converts there."""
    return (
        target.dtype == source.dtype
        and target.shape == source.shape
        and target.is_contiguous()
        and source.is_contiguous()
        and not (source.is_conj() or source.is_neg())
    )
