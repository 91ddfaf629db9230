"""Page-locking, with CUDA's two calls replaced by ones that keep account and refuse what CUDA refuses."""

from __future__ import annotations

import logging
import mmap
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.core.images import create_slots
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.protocol import ImageFile, Layout, Options
from async_ckpt.core.region import Region
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import RunRecord, new_run_path, remove_run
from async_ckpt.mapped import Part, Slot
from async_ckpt.pages import page_runs
from async_ckpt.pinning import MAX_RUNS, Pinned
from async_ckpt.restore import OpenFile, Target
from async_ckpt.sharding import Shard, find_shards

PAGE = mmap.PAGESIZE
FILE = "adapter_model.safetensors"


class Registrations:
    """The page-locked ranges of a process. `refuse`: which call fails, counted from 0."""

    def __init__(self, refuse: int | None = None) -> None:
        self.now: dict[int, int] = {}
        self.calls = 0
        self.refuse = refuse

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802
        assert (pointer % PAGE, size % PAGE, flags) == (0, 0, 0)
        assert size > 0
        assert all(pointer >= at + held or pointer + size <= at for at, held in self.now.items()), "they overlap"
        self.calls += 1
        if self.calls - 1 == self.refuse:
            return 2  # cudaErrorMemoryAllocation
        self.now[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
        del self.now[pointer]
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Registrations:
    registrations = Registrations()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: registrations)
    return registrations


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30 * PAGE), st.integers(1, 3 * PAGE)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 30 * PAGE), st.integers(1, 3 * PAGE)), max_size=6),
)
def test_what_is_held_and_what_is_split(own: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    """Against a set of locked pages, numbered by the registration that they belong to."""
    image = torch.zeros(34 * PAGE, dtype=torch.uint8)
    image = image[-image.data_ptr() % PAGE :]
    registrations = Registrations()
    runs = page_runs([(start, start + size) for start, size in own])
    locked = {page: number for number, (start, stop) in enumerate(runs) for page in range(start // PAGE, stop // PAGE)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "cudart", lambda: registrations)
        pinned = Pinned()
        pinned.register(image.data_ptr(), runs, FILE)
        for start, size in own + asked:
            touched = {locked.get(page) for page in range(start // PAGE, (start + size - 1) // PAGE + 1)}
            view = image[start : start + size]
            assert pinned.holds(view) == (len(touched) == 1 and None not in touched)
            assert pinned.splits(view) == (len(touched) > 1)
        assert all(pinned.holds(image[start : start + size]) for start, size in own)
        assert len(registrations.now) == len(runs)
        pinned.close()
        pinned.close()
        assert registrations.now == {}
        assert not any(pinned.holds(image[start : start + size]) for start, size in own)


class Piece(Shard):
    """A part of a tensor, of which only the place is asked."""

    def local(self) -> torch.Tensor:
        raise NotImplementedError


class Model(torch.nn.Module):
    """Five tensors of which a rank may own some: small ones share pages, `large` has many."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in {"a": 3, "b": 5, "large": 40 * PAGE, "y": 3 * PAGE, "z": 7}.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(size)))


@pytest.fixture
def run() -> Iterator[Path]:
    path = new_run_path(f"ipc:///nowhere/{secrets.token_hex(4)}")
    yield path
    remove_run(path)


def make_slot(run: Path, model: Model, own: dict[str, Region]) -> tuple[Slot, list[Target]]:
    """A slot of one file with all tensors, of which this rank owns `own`; and what a restore reads from it."""
    shards = find_shards(model)
    layout = plan_file(FILE, [TensorSpec(name, "F32", shard.shape) for name, shard in shards.items()])
    image = Layout((ImageFile(FILE, layout.header, layout.total_bytes),), {})
    options = Options("/data/run", 1, 1, Policy(), 1.0)
    create_slots(run, RunRecord("job", options, [FILE], [], None, {}), image)
    parts = []
    for extent in layout.extents:
        name = extent.spec.name
        if name in own:
            parts.append(Part(FILE, extent, Piece(name, extent.spec.shape, torch.float32, own[name])))
    targets = [Target(extent.spec.name, extent.spec, shards[extent.spec.name]) for extent in layout.extents]
    return Slot(run, 0, parts), targets


def whole(*names: str) -> dict[str, Region]:
    sizes = {name: parameter.shape for name, parameter in Model().named_parameters()}
    return {name: Region.whole(tuple(sizes[name])) for name in names}


def test_a_slot_locks_the_pages_of_its_own_parts_and_no_others(run: Path, cuda: Registrations) -> None:
    part = Region.run(2 * PAGE, 100)  # of the 160 pages of `large`
    slot, _ = make_slot(run, Model(), whole("a", "z") | {"large": part})
    slot.pin()
    assert len(slot.targets) == 3
    assert all(slot.is_pinned(target) for target in slot.targets)
    assert sum(cuda.now.values()) <= 5 * PAGE, "one or two for each part"
    assert len(cuda.now) == 3
    slot.close()
    assert cuda.now == {}
    assert cuda.calls == 3


def test_what_was_locked_before_cuda_refused_is_unlocked_and_the_rest_is_known_not_to_be(
    run: Path, cuda: Registrations, caplog: pytest.LogCaptureFixture
) -> None:
    slot, _ = make_slot(run, Model(), whole("a", "z") | {"large": Region.run(2 * PAGE, 100)})
    cuda.refuse = 1
    with caplog.at_level(logging.WARNING):
        slot.pin()
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot pin {FILE} (CUDA error 2, after 1 of 3 runs of pages): saves will be slower"
    ]
    assert cuda.calls == 2
    assert sorted(map(slot.is_pinned, slot.targets)) == [False, False, True]
    slot.close()
    assert cuda.now == {}


def test_thousands_of_parts_are_locked_in_a_thousand_runs(cuda: Registrations) -> None:
    pinned = Pinned()
    spans = [(number * 4 * PAGE, number * 4 * PAGE + 10) for number in range(3 * MAX_RUNS)]
    pinned.register(0, page_runs(spans, MAX_RUNS), FILE)
    assert len(cuda.now) == MAX_RUNS
    pinned.close()


def test_a_restore_reads_no_memory_of_which_a_part_is_locked(
    run: Path, cuda: Registrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`a` and `b` share a page, `large` begins there, `y` and `z` end in one: whoever owns one of them locks pages of
    others. Every address that the restore copies from is looked at; the bytes are compared with the image's."""
    model = Model()
    slot, targets = make_slot(run, model, whole("b", "y"))
    slot.pin()
    image = slot.mapping(FILE)
    assert image is not None
    values = torch.randn(sum(target.spec.numel for target in targets))
    start = next(iter(OpenFile(slot.paths.image / FILE).extents.values())).start
    image.bytes[start:] = values.view(torch.uint8)
    read: list[torch.Tensor] = []
    copy: Any = torch._foreach_copy_

    def recorded(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> object:
        read.extend(sources)
        return copy(destinations, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", recorded)
    file = OpenFile(slot.paths.image / FILE, slot.mapping(FILE))
    file.read_into(targets)
    assert len(read) == 5
    locked = {page for at, size in cuda.now.items() for page in range(at // PAGE, (at + size) // PAGE)}
    for source in read:
        pages = range(source.data_ptr() // PAGE, (source.data_ptr() + source.nbytes - 1) // PAGE + 1)
        assert len({page in locked for page in pages}) == 1
    ours = image.bytes.data_ptr()
    inside = [ours <= source.data_ptr() < ours + image.bytes.numel() for source in read]
    assert 2 <= sum(inside) < 5, "own ones are read where they are locked, others elsewhere"
    for target in targets:
        extent = file.extents[target.name]
        expected = values[(extent.start - start) // 4 : (extent.stop - start) // 4]
        assert torch.equal(dict(model.named_parameters())[target.name], expected)
    slot.close()
