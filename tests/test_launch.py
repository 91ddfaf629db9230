"""When a batch is copied tensor by tensor and when by its graph, and that the bytes are the same."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from async_ckpt.batch import Batch
from async_ckpt.launch import Launcher, Uses, graphs_wanted

DEVICE = torch.device("cuda", 0)


@dataclass
class Slot:
    index: int = 0
    unpinned: set[int] = field(default_factory=set)  # addresses

    def is_pinned(self, view: torch.Tensor) -> bool:
        return view.data_ptr() not in self.unpinned


class Machine(RuleBasedStateMachine):
    """Two slots; the training thread asks, the staging thread builds whenever it gets to it. The model remembers, for
    each slot, the last batch and how often it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: Uses[str] = Uses()
        self.slots = [Slot(0), Slot(1)]
        self.batches: list[Batch] = [([], []) for _ in range(4)]
        self.asked: dict[int, list[Batch]] = {0: [], 1: []}
        self.graphs: dict[str, tuple[int, int]] = {}  # of which slot and which batch
        self.valid: dict[int, str] = {}
        self.refused: set[int] = set()
        self.freed: list[str] = []
        self.begun: list[tuple[Any, Any, Batch]] = []
        self.numbers = itertools.count()
        self.given_up = False

    @rule(slot=st.integers(0, 1), number=st.integers(0, 3))
    def save(self, slot: int, number: int) -> None:
        batch = self.batches[number]
        if not self.asked[slot] or self.asked[slot][-1] is not batch:
            self.asked[slot] = []
            self.valid.pop(slot, None)
            self.refused.discard(slot)
        graph = self.uses.graph_for(slot, self.slots[slot], batch)
        assert graph == (None if self.given_up else self.valid.get(slot))
        self.asked[slot].append(batch)

    @rule()
    def look(self) -> None:
        due: list[Any] = self.uses.due()
        expected = {slot for slot, asked in self.asked.items()
                    if len(asked) >= 2 and slot not in self.valid and slot not in self.refused}  # fmt: skip
        assert {key for key, _, _ in due} == (set() if self.given_up else expected)
        assert all(slot is self.slots[key] and batch is self.asked[key][-1] for key, slot, batch in due)
        self.begun = due

    @precondition(lambda self: self.begun)
    @rule(worth=st.booleans())
    def finish(self, worth: bool) -> None:
        """What `look` saw may be long past."""
        key, _, batch = self.begun.pop()
        graph = f"graph {next(self.numbers)}" if worth else None
        current = bool(self.asked[key]) and self.asked[key][-1] is batch and not self.given_up
        if graph is not None:
            self.graphs[graph] = (key, id(batch))
        if current and graph is not None:
            self.valid[key] = graph
        if current and graph is None:
            self.refused.add(key)
        self.uses.built(key, batch, graph)

    @rule(slot=st.integers(0, 1))
    def drop(self, slot: int) -> None:
        self.uses.drop(slot)
        self.asked[slot] = []
        self.valid.pop(slot, None)
        self.refused.discard(slot)
        self.begun = [each for each in self.begun if each[0] != slot]

    @rule()
    def free(self) -> None:
        self.freed += self.uses.retired()

    @precondition(lambda self: not self.given_up)
    @rule()
    def give_up(self) -> None:
        assert self.uses.give_up()
        assert not self.uses.give_up()
        self.given_up = True
        self.valid.clear()

    @invariant()
    def each_graph_is_freed_at_most_once_and_never_while_it_is_used(self) -> None:
        assert len(set(self.freed)) == len(self.freed)
        assert not set(self.freed) & set(self.valid.values())

    def teardown(self) -> None:
        self.uses.give_up()
        self.freed += self.uses.retired()
        assert sorted(self.freed) == sorted(self.graphs)


Machine.TestCase.settings = settings(max_examples=200, deadline=None)
TestMachine = Machine.TestCase


class Graph:
    def __init__(self, copies: list[tuple[int, int, int]]) -> None:
        self.copies = copies
        self.launches = self.closes = 0

    def launch(self, stream: int) -> None:
        assert not self.closes
        for copy in self.copies:
            ctypes.memmove(*copy)
        self.launches += 1

    def close(self) -> None:
        self.closes += 1


class Device:
    """Stands for CUDA: a graph copies from the addresses that it was given."""

    def __init__(self) -> None:
        self.built: list[Graph] = []

    def build(self, device: torch.device, copies: Iterable[tuple[int, int, int]]) -> Graph:
        self.built.append(Graph(list(copies)))
        return self.built[-1]


class Rig:
    """Batches copied by a launcher; `direct` are those that it copied tensor by tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, graphs: bool = True) -> None:
        self.device = Device()
        self.direct: list[Batch] = []
        self.capturing = False
        self.slot = Slot()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        self.launcher = Launcher(self.device if graphs else None, self.copy)  # type: ignore[arg-type]

    def copy(self, batch: Batch) -> None:
        self.direct.append(batch)
        torch._foreach_copy_(*batch)

    def save(self, batch: Batch, slot: Slot | str | None = "its own", settle: bool = True) -> str:
        """By which way; the bytes are compared."""
        for target, source in zip(*batch, strict=True):
            target.zero_()
            source.add_(1)
        before, launches = len(self.direct), sum(graph.launches for graph in self.device.built)
        self.launcher.start(self.slot if slot == "its own" else slot, DEVICE, batch, 7)  # type: ignore[arg-type]
        assert all(map(torch.equal, *batch))
        if settle:
            self.launcher.settle()
        launched = sum(graph.launches for graph in self.device.built) - launches
        return (
            "graph" * launched
            + ("+" if launched and len(self.direct) > before else "")
            + ("direct" * (len(self.direct) - before))
        )


def batch(count: int = 20, size: int = 5) -> Batch:
    return [torch.zeros(size) for _ in range(count)], [torch.randn(size) for _ in range(count)]


def test_two_direct_copies_then_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, one = Rig(monkeypatch), batch()
    assert [rig.save(one) for _ in range(5)] == ["direct", "direct", "graph", "graph", "graph"]
    assert len(rig.device.built) == 1
    rig.launcher.close()
    assert [graph.closes for graph in rig.device.built] == [1]


def test_until_it_is_built_copies_are_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, one = Rig(monkeypatch), batch()
    assert [rig.save(one, settle=False) for _ in range(4)] == ["direct"] * 4
    rig.launcher.settle()
    assert rig.save(one) == "graph"


def test_a_batch_that_is_new_at_every_save_gets_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    assert [rig.save(batch()) for _ in range(6)] == ["direct"] * 6
    assert rig.device.built == []


def test_another_batch_begins_anew_and_the_old_graph_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, one, two = Rig(monkeypatch), batch(), batch()
    ways = [rig.save(each) for each in [one, one, one, two, two, two]]
    assert ways == ["direct", "direct", "graph"] * 2
    assert [graph.closes for graph in rig.device.built] == [1, 0]


@pytest.mark.parametrize("back", [True, False])
def test_a_tensor_that_moved_inside_the_same_batch_is_copied_from_where_it_lies(
    monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    """Also if it lay elsewhere just while the graph was built: a graph reads addresses, not tensors."""
    rig, one = Rig(monkeypatch), batch()
    kept = one[1][3].data
    if back:
        rig.save(one)
        rig.save(one, settle=False)
        one[1][3].data = torch.randn(5)
        rig.launcher.settle()
        one[1][3].data = kept
    else:
        assert [rig.save(one) for _ in range(3)][-1] == "graph"
        one[1][3].data = torch.randn(5)
    assert len(rig.device.built) == 1
    assert [rig.save(one) for _ in range(4)] == ["direct", "direct", "direct", "graph"]
    assert [graph.closes for graph in rig.device.built] == [1, 0]


def test_what_a_graph_cannot_copy_is_copied_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, (targets, sources) = Rig(monkeypatch), batch()
    wide = torch.zeros(4, 6)
    odd: list[tuple[torch.Tensor, torch.Tensor]] = [
        (wide[:, :3], torch.randn(4, 3)),  # a part of each row
        (torch.zeros(3, 4), torch.randn(4, 3).t()),
        (torch.zeros(3, dtype=torch.float64), torch.randn(3)),
        (torch.zeros(3, dtype=torch.complex64), torch.randn(3, dtype=torch.complex64).conj()),
        (torch.zeros(3), torch.randn(3)),  # not locked
    ]
    rig.slot.unpinned.add(odd[-1][0].data_ptr())
    empty = [(torch.zeros(0), torch.zeros(0))]
    every = [*odd[:3], *zip(targets, sources, strict=True), *empty, *odd[3:]]
    mixed = [target for target, _ in every], [source for _, source in every]
    assert [rig.save(mixed) for _ in range(3)] == ["direct", "direct", "graph+direct"]
    assert len(rig.device.built[0].copies) == 20
    assert {id(target) for target in rig.direct[-1][0]} == {id(target) for target, _ in odd}


def test_few_copies_are_not_worth_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, few = Rig(monkeypatch), batch(15)
    assert [rig.save(few) for _ in range(4)] == ["direct"] * 4
    assert rig.device.built == []


def test_buffers_and_captured_trainings_are_copied_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, one = Rig(monkeypatch), batch()
    assert [rig.save(one, slot=None) for _ in range(4)] == ["direct"] * 4
    assert rig.device.built == []
    assert [rig.save(one) for _ in range(3)][-1] == "graph"
    rig.capturing = True
    assert rig.save(one) == "direct"
    rig.capturing = False
    assert rig.save(one) == "graph", "it is as good as it was"


def test_slots_and_devices_have_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, batches = Rig(monkeypatch), [batch(), batch()]
    slots = [Slot(0), Slot(1)]
    ways = [rig.save(batches[number % 2], slot=slots[number % 2]) for number in range(6)]
    assert ways == ["direct"] * 4 + ["graph"] * 2
    assert len(rig.device.built) == 2


def test_without_graphs_all_is_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, one = Rig(monkeypatch, graphs=False), batch()
    assert [rig.save(one) for _ in range(4)] == ["direct"] * 4
    rig.launcher.close()


def test_a_variable_says_that_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, wanted in {"0": False, "1": True, "": False}.items():
        monkeypatch.setenv("ASYNC_CKPT_CUDA_GRAPH", value)
        assert graphs_wanted() is wanted
    monkeypatch.delenv("ASYNC_CKPT_CUDA_GRAPH")
    assert not graphs_wanted()
