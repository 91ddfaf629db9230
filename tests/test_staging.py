"""Slots as a rank sees them: views at the right bytes, journal in the right order, a fence that waits."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.batch import Prepared
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.images import create_slots
from async_ckpt.core.layout import FileLayout, TensorSpec, plan_file
from async_ckpt.core.protocol import ImageFile, Layout, Options, SaveRecord
from async_ckpt.core.region import Region
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import Phase, RunRecord, new_run_path, remove_run
from async_ckpt.mapped import Part, Slot, image_view
from async_ckpt.pages import span_of
from async_ckpt.sharding import find_shards
from async_ckpt.staging import Copy, Staging

FILE = "adapter_model.safetensors"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_view_is_the_region_of_the_tensor(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    specs = [TensorSpec("a", "I64", (3,)), TensorSpec("b", "F32", shape), TensorSpec("c", "U8", (5,))]
    layout = plan_file("x", specs)
    whole = torch.arange(layout.extents[1].spec.numel, dtype=torch.float32).view(shape)
    image = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    extent = layout.extents[1]
    image[extent.start : extent.stop] = whole.view(-1).view(torch.uint8)
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, whole.numel() - 1))
        region = Region.run(start, data.draw(st.integers(0, whole.numel() - start)))
        expected = whole.view(-1)[region.offsets[0] : region.offsets[0] + region.sizes[0]]
    else:
        offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        sizes = tuple(data.draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True))
        region = Region(False, offsets, sizes)
        expected = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
    view = image_view(image, extent, torch.float32, region)
    assert tuple(view.shape) == region.sizes
    assert torch.equal(view, expected)
    assert view.numel() == 0 or view.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()


def test_of_a_large_tensor_only_the_own_part_is_mapped_ahead() -> None:
    extent = plan_file("x", [TensorSpec("a", "F32", (8, 100))]).extents[0]
    image = torch.zeros(extent.stop, dtype=torch.uint8)
    rows = image_view(image, extent, torch.float32, Region(False, (2, 0), (3, 100)))
    assert span_of(rows, image.data_ptr()) == (extent.start + 800, extent.start + 2000)
    columns = image_view(image, extent, torch.float32, Region(False, (0, 10), (8, 20)))
    assert span_of(columns, image.data_ptr()) == (extent.start + 40, extent.stop - 280)


class Rig:
    """A small model's parameters, staged by one rank into real slots."""

    def __init__(self, run: Path, *, overlap: bool, size: int = 64) -> None:
        self.model = torch.nn.Sequential(torch.nn.Linear(size, 3), torch.nn.BatchNorm1d(3))
        shards = {name: shard for name, shard in find_shards(self.model).items() if shard.shape}
        names = {torch.float32: "F32", torch.int64: "I64"}
        self.layout: FileLayout = plan_file(
            FILE, [TensorSpec(name, names[shard.dtype], shard.shape) for name, shard in shards.items()]
        )
        image = Layout((ImageFile(FILE, self.layout.header, self.layout.total_bytes),), {})
        options = Options("/data/run", 1, 2, Policy(), 1.0)
        create_slots(run, RunRecord("job", options, [FILE], [], None, {}), image)
        parts = [Part(FILE, extent, shards[extent.spec.name]) for extent in self.layout.extents]
        self.slots = [Slot(run, index, parts) for index in range(2)]
        self.staging = Staging(0, self.slots, parts, overlap=overlap)

    def expected(self) -> bytes:
        values = dict(self.model.state_dict())
        data = [values[extent.spec.name].contiguous().view(-1).view(torch.uint8) for extent in self.layout.extents]
        return self.layout.header + torch.cat(data).numpy().tobytes()

    def written(self, slot: int) -> bytes:
        return (self.slots[slot].paths.image / FILE).read_bytes()


@pytest.fixture
def run() -> Iterator[Path]:
    path = new_run_path(f"ipc:///nowhere/{secrets.token_hex(4)}")
    yield path
    remove_run(path)


def record(step: int) -> SaveRecord:
    return SaveRecord(step, {"loss": 1.0}, None, {})


@pytest.mark.parametrize("overlap", [True, False])
def test_the_image_is_the_file(run: Path, overlap: bool) -> None:
    rig = Rig(run, overlap=overlap)
    ended = threading.Event()
    expected = rig.expected()
    assert len(rig.layout.extents) == 6
    copy = rig.staging.begin(rig.slots[0], 5, lambda: record(5), lambda copy: ended.set())
    rig.staging.fence()
    with torch.no_grad():
        for parameter in rig.model.parameters():
            parameter.add_(1)
    assert ended.wait(10)
    assert copy.error is None
    assert rig.written(0) == expected
    assert rig.slots[0].state.complete_step() == 5
    assert rig.slots[0].paths.records(1, 5) == [(0, record(5))]
    rig.staging.close()


def test_buffers_are_copied_before_begin_returns(run: Path) -> None:
    rig = Rig(run, overlap=True)
    rig.model.train()
    held = threading.Event()
    ended = threading.Event()
    rig.staging._tasks.put(blocker(rig, held))
    expected = rig.model[1].running_mean.clone()
    rig.staging.begin(rig.slots[0], 5, lambda: None, lambda copy: ended.set())
    rig.model(torch.rand(4, 64) + 3)
    assert not torch.equal(rig.model[1].running_mean, expected)
    held.set()
    assert ended.wait(10)
    extent = next(extent for extent in rig.layout.extents if extent.spec.name == "1.running_mean")
    assert rig.written(0)[extent.start : extent.stop] == expected.numpy().tobytes()
    rig.staging.close()


def blocker(rig: Rig, held: threading.Event) -> Copy:
    """Keeps the staging thread busy until `held`, so that a test decides when the next copy runs."""

    def wait() -> None:
        assert held.wait(30)

    copy = Copy(rig.slots[1], 1, wait, lambda copy: None)
    copy.host = ([], [])
    return copy


def test_the_fence_waits_for_the_copy_and_the_cell_says_writing_until_then(run: Path) -> None:
    rig = Rig(run, overlap=True)
    held = threading.Event()
    rig.staging._tasks.put(blocker(rig, held))
    ended = threading.Event()
    rig.staging.begin(rig.slots[0], 5, lambda: None, lambda copy: ended.set())
    assert rig.slots[0].state.cell(0).phase is Phase.WRITING
    fenced = threading.Event()

    def fence() -> None:
        rig.staging.fence()
        fenced.set()

    thread = threading.Thread(target=fence)
    thread.start()
    assert not fenced.is_set()
    assert not ended.is_set()
    held.set()
    thread.join(10)
    assert fenced.is_set()
    assert rig.slots[0].state.complete_step() == 5
    rig.staging.close()


def test_a_parameter_moved_before_the_thread_has_looked_is_saved_as_it_was(run: Path) -> None:
    rig = Rig(run, overlap=True)
    for number in (1.0, 2.0):  # at first, and once it lies elsewhere than when attached
        held = threading.Event()
        rig.staging._tasks.put(blocker(rig, held))
        weight = rig.model[0].weight
        weight.data = torch.full_like(weight, number)
        copy = rig.staging.begin(rig.slots[0], int(number), lambda: None, lambda copy: None)
        weight.data = torch.full_like(weight, 9.0)
        held.set()
        assert copy.done.wait(10)
        assert copy.error is None
        extent = next(extent for extent in rig.layout.extents if extent.spec.name == "0.weight")
        assert set(memoryview(rig.written(0)[extent.start : extent.stop]).cast("f")) == {number}
    rig.staging.close()


def test_a_copy_that_fails_says_so_and_the_next_one_works(run: Path) -> None:
    rig = Rig(run, overlap=True)
    ended: list[Copy] = []

    def fail() -> SaveRecord:
        raise OSError(28, "No space left on device")

    first = rig.staging.begin(rig.slots[0], 5, fail, ended.append)
    first.done.wait(10)
    second = rig.staging.begin(rig.slots[1], 6, lambda: record(6), ended.append)
    second.done.wait(10)
    rig.staging.close()
    assert ended == [first, second]
    assert isinstance(first.error, OSError)
    assert second.error is None


def test_a_replaced_parameter_is_an_error_and_nothing_is_written(run: Path) -> None:
    rig = Rig(run, overlap=True)
    before = rig.written(0)
    rig.model[0].weight = torch.nn.Parameter(torch.zeros(3, 64))
    copy = rig.staging.begin(rig.slots[0], 5, lambda: record(5), lambda copy: None)
    assert copy.done.wait(10)
    assert isinstance(copy.error, CheckpointError)
    assert "'0.weight' is no longer the tensor" in str(copy.error)
    assert rig.slots[0].state.cell(0).phase is Phase.WRITING
    buffers = {e.spec.name: e for e in rig.layout.extents if e.spec.name.startswith("1.running")}
    after = rig.written(0)
    weight = next(extent for extent in rig.layout.extents if extent.spec.name == "0.weight")
    assert len(buffers) == 2
    assert after[weight.start : weight.stop] == before[weight.start : weight.stop]
    rig.staging.close()


def test_exactly_one_foreach_copy_a_save(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of single copies in a thread takes hundreds of times as long beside a busy training thread."""
    rig = Rig(run, overlap=True)
    calls = []
    original = torch._foreach_copy_

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(threading.current_thread().name)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    rig.staging.begin(rig.slots[0], 5, lambda: None, lambda copy: None).done.wait(10)
    rig.staging.close()
    assert calls == ["MainThread", "async-ckpt-staging"], "one for the buffers, one for all parameters"


def test_a_report_waits_for_the_copies_before_it(run: Path) -> None:
    """A skip that overtook the copy of the step before would tell the saver that this step will never come."""
    rig = Rig(run, overlap=True)
    held = threading.Event()
    order: list[object] = []
    rig.staging._tasks.put(blocker(rig, held))
    rig.staging.begin(rig.slots[0], 5, lambda: None, lambda copy: order.append(copy.step))
    rig.staging.after_copies(lambda: order.append("skipped 6"))
    assert order == []
    held.set()
    rig.staging.close()
    assert order == [5, "skipped 6"]


@pytest.mark.parametrize("host", [True, False])
def test_the_fence_waits_for_every_device_copy_whatever_else_is_under_way(
    run: Path, monkeypatch: pytest.MonkeyPatch, host: bool
) -> None:
    """AdamW's step counts lie on the host though its moments lie on the device. Streams and events are stand-ins."""
    waited: list[object] = []

    class Stream:
        def wait_event(self, event: object) -> None:
            waited.append(event)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    rig = Rig(run, overlap=True)
    copy = Copy(rig.slots[0], 5, lambda: None, lambda copy: None)
    copy.device_events = [(torch.device("cuda", 0), "first"), (torch.device("cuda", 1), "second")]
    copy.host = ([torch.zeros(1)], [torch.zeros(1)]) if host else ([], [])
    if host:
        copy.copied.set()
    rig.staging._in_flight.append(copy)
    rig.staging.fence()
    assert waited == ["first", "second"]
    rig.staging.close()


def test_what_is_copied_into_a_slot_is_one_object_until_something_moves(run: Path) -> None:
    """Else no graph of copies would ever be launched."""
    rig = Rig(run, overlap=True)
    views = rig.staging._parameters.lookup.views
    first = rig.staging._checked(rig.slots[0], views())
    assert len(first.host[0]) == 4
    assert rig.staging._checked(rig.slots[0], views()) is first
    assert rig.staging._checked(rig.slots[1], views()) is not first
    assert rig.staging._checked(rig.slots[0], views()) is first
    weight = rig.model[0].weight
    weight.data = torch.zeros_like(weight)
    second = rig.staging._checked(rig.slots[0], views())
    assert second is not first
    assert rig.staging._checked(rig.slots[0], views()) is second
    rig.staging.close()


def test_the_first_save_finds_its_copy_prepared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(run, overlap=True)
    prepared = []
    original = Prepared.of

    def counted(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> Prepared:
        prepared.append(len(targets))
        return original(targets, sources)

    monkeypatch.setattr(Prepared, "of", counted)
    rig.staging.begin(rig.slots[0], 5, lambda: None, lambda copy: None).done.wait(10)
    rig.staging.close()
    assert prepared == [2, 0], "the buffers, and the state of no optimizer; no parameter"
