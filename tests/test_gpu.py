"""On a CUDA device: pinned images, a side stream, a fence on the device, no device memory for a save, and one launch
for all its copies."""

from __future__ import annotations

import gc
import logging
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import async_ckpt
from async_ckpt.core.location import Url
from async_ckpt.cudart import CopyGraph, CudaError, Graphs, find_graphs
from tests.tiny_llama import difference, lora, peft_model, saved_files, with_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNC_CKPT_CUDA_GRAPH", "1")


@pytest.fixture
def model() -> Iterator[Any]:
    yield peft_model(config=lora(r=64)).to(DEVICE)
    gc.collect()
    torch.cuda.empty_cache()


def is_locked(slot: Any, path: str, byte: int) -> bool:
    """CUDA's answer. `Tensor.is_pinned` asks for the first byte of the storage, so this byte is made one."""
    return torch.frombuffer(slot._maps[path], dtype=torch.uint8, offset=byte, count=1).is_pinned()


def fill(model: Any, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("staging", ["overlap", "sync"])
def test_the_file_is_what_peft_writes(model: Any, tmp_path: Path, staging: Any) -> None:
    expected = saved_files(with_values(peft_model(config=lora(r=64)), None))
    with async_ckpt.attach(model, directory=tmp_path, staging=staging) as ckpt:
        path = ckpt.save(1).wait()
    written = (path / "adapter_model.safetensors").read_bytes()
    assert difference(written, expected["adapter_model.safetensors"]) == ""


def test_a_save_allocates_nothing_on_the_device(model: Any, tmp_path: Path) -> None:
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        ckpt.save(1).wait()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for step in range(2, 6):
            ckpt.save(step).wait()
        assert torch.cuda.max_memory_allocated() == before


def test_the_image_is_pinned(model: Any, tmp_path: Path) -> None:
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        for slot in ckpt._staging.slots:
            own = [(path, span) for path, spans in slot._own.items() for span in spans]
            assert len(own) == len(slot.targets) > 0
            assert all(is_locked(slot, path, byte) for path, (start, stop) in own for byte in (start, stop - 1))


@pytest.mark.parametrize("staging", ["overlap", "sync"])
@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lambda parameters: torch.optim.AdamW(parameters, lr=1.0),
        lambda parameters: torch.optim.AdamW(parameters, lr=1.0, fused=True),
    ],
)
def test_a_step_that_overwrites_everything_tears_nothing(model: Any, tmp_path: Path, make: Any, staging: Any) -> None:
    """The copy waits behind a busy stream, and the step that follows at once must wait for the copy, on the device.
    AdamW's step counts are host tensors, so both kinds of copy are under way."""
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    busy = torch.rand(2048, 2048, device=DEVICE)
    with async_ckpt.attach(model, optimizer, directory=tmp_path, staging=staging) as ckpt:
        for step in range(1, 51):
            fill(model, float(step))
            for _ in range(4):
                busy = busy @ busy / busy.norm()
            handle = ckpt.save(step)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.full_like(parameter, 1000.0)
            optimizer.step()
            tensors = read(handle.wait())
            assert len(tensors) > 0
            assert all(bool((tensor == step).all()) for tensor in tensors.values()), step


def test_save_does_not_wait_for_the_device(model: Any, tmp_path: Path) -> None:
    """With seconds of work queued on the device, save returns while that work is still running."""
    busy = torch.rand(8192, 8192, device=DEVICE)
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        ckpt.save(1).wait()
        for _ in range(50):
            busy = busy @ busy / busy.norm()
        done = torch.cuda.Event()
        done.record()
        handle = ckpt.save(2)
        assert not done.query(), "the queue was empty before save returned: make the work longer"
        handle.wait()


def test_a_restore_is_exact(model: Any, tmp_path: Path) -> None:
    before = trained(model)
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        ckpt.save(1).wait()
        fill(model, 0.0)
        restored = ckpt.restore()
        assert restored is not None
        assert restored.source == "ram"
    after = trained(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def built(ckpt: Any) -> Any:
    """What is launched, once the staging thread has done all that it has to do so far."""
    reached = threading.Event()
    ckpt._staging.after_copies(reached.set)
    assert reached.wait(60)
    return {key: use.graph for key, use in ckpt._staging._launcher._uses._uses.items()}


def saved_until_launched(ckpt: Any, model: Any, first: int = 1) -> int:
    """Save into each of two slots until both have a graph; returns the next step. The bytes are compared."""
    for step in range(first, first + 4):
        save_and_compare(ckpt, model, step)
    graphs = built(ckpt)
    assert len(graphs) == 2
    assert all(
        graph is not None and len(graph.sources) == len(trained(model)) and not graph.rest[0]
        for graph in graphs.values()
    )
    return first + 4


def save_and_compare(ckpt: Any, model: Any, step: int) -> None:
    fill_at_random(model)
    path = ckpt.save(step).wait()
    assert difference((path / "adapter_model.safetensors").read_bytes(), as_peft_writes(model)) == ""


def fill_at_random(model: Any) -> None:
    """In place: no tensor moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


def as_peft_writes(model: Any) -> bytes:
    return saved_files(model)["adapter_model.safetensors"]


def test_the_bytes_are_exact_with_launched_copies(model: Any, tmp_path: Path) -> None:
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        step = saved_until_launched(ckpt, model)
        graphs = built(ckpt)
        for later in range(step, step + 6):
            save_and_compare(ckpt, model, later)
        assert built(ckpt) == graphs, "none was given up, none was built anew"


@pytest.mark.parametrize("staging", ["overlap", "sync"])
def test_launched_copies_tear_nothing(model: Any, tmp_path: Path, staging: Any) -> None:
    """The step that follows at once overwrites everything, behind a busy stream."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, fused=True)
    busy = torch.rand(2048, 2048, device=DEVICE)
    with async_ckpt.attach(model, optimizer, directory=tmp_path, staging=staging) as ckpt:
        for step in range(1, 31):
            fill(model, float(step))
            for _ in range(4):
                busy = busy @ busy / busy.norm()
            handle = ckpt.save(step)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.full_like(parameter, 1000.0)
            optimizer.step()
            tensors = read(handle.wait())
            assert all(bool((tensor == step).all()) for tensor in tensors.values()), step
        assert all(graph is not None for graph in built(ckpt).values())


def test_a_parameter_that_moved_is_saved_from_where_it_lies(model: Any, tmp_path: Path) -> None:
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        step = saved_until_launched(ckpt, model)
        before = built(ckpt)
        with torch.no_grad():
            moved = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            moved.data = torch.randn_like(moved)
        step = saved_until_launched(ckpt, model, step)
        assert not {id(graph) for graph in built(ckpt).values()} & {id(graph) for graph in before.values()}
        save_and_compare(ckpt, model, step)


@pytest.mark.parametrize("fails", ["build", "launch"])
def test_what_fails_with_graphs_changes_no_byte(
    model: Any, tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with async_ckpt.attach(model, directory=tmp_path) as ckpt, caplog.at_level(logging.WARNING):
        if fails == "launch":
            step = saved_until_launched(ckpt, model)
            # A null graph: CUDA itself refuses it.
            monkeypatch.setattr(
                CopyGraph, "launch", lambda self, stream: self._graphs.call("cudaGraphLaunch", 0, stream)
            )
        else:
            step = 1
            monkeypatch.setattr(Graphs, "build", lambda self, *_: self.call("cudaGraphLaunch", 0, 0))
        for later in range(step, step + 6):
            save_and_compare(ckpt, model, later)
        warnings = [record.getMessage() for record in caplog.records if "tensor by tensor" in record.getMessage()]
        assert len(warnings) == 1
        assert built(ckpt) == {}
        torch.zeros(8, device=DEVICE).add_(1).cpu()  # CUDA remembers no error


def test_a_graph_refused_by_cuda_is_an_error_and_forgotten(model: Any) -> None:
    graphs = find_graphs()
    assert graphs is not None
    with pytest.raises(CudaError, match="cudaGraphLaunch: cudaErrorInvalid"):
        graphs.call("cudaGraphLaunch", 0, 0)
    torch.zeros(8, device=DEVICE).add_(1).cpu()


def test_a_launched_save_is_one_launch_and_allocates_nothing(model: Any, tmp_path: Path) -> None:
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        step = saved_until_launched(ckpt, model)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiled:
            ckpt.save(step).wait()
            torch.cuda.synchronize()
        assert (torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()) == before
        on_host = torch.autograd.DeviceType.CPU
        calls = [event.name for event in profiled.events() if event.device_type == on_host]
        assert calls.count("cudaGraphLaunch") == 1
        assert calls.count("cudaMemcpyAsync") == 0
        assert calls.count("aten::copy_") == 0


def test_random_numbers_and_captures_of_the_training_are_not_touched(model: Any, tmp_path: Path) -> None:
    """A graph of the training with dropout draws the same numbers with saves between its replays as without."""

    def drawn(save: Any) -> list[torch.Tensor]:
        torch.cuda.manual_seed(1)
        ones = torch.ones(1000, device=DEVICE)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = torch.nn.functional.dropout(ones)
        found = []
        for number in range(8):
            graph.replay()
            found.append(out.clone())
            save(number)
        return found

    expected = drawn(lambda number: None)
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        step = saved_until_launched(ckpt, model)
        state = torch.cuda.get_rng_state()
        ckpt.save(step).wait()
        assert torch.equal(torch.cuda.get_rng_state(), state)
        found = drawn(lambda number: ckpt.save(step + 1 + number))
        ckpt.wait()
    assert all(map(torch.equal, found, expected))


def test_without_the_variable_there_are_no_graphs(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASYNC_CKPT_CUDA_GRAPH")
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        for step in range(1, 7):
            save_and_compare(ckpt, model, step)
        assert built(ckpt) == {}


def test_no_page_beyond_the_own_ones_is_locked(model: Any, tmp_path: Path) -> None:
    """CUDA is asked, for the first byte of every page, whether it is locked."""
    with async_ckpt.attach(model, directory=tmp_path) as ckpt:
        slot = ckpt._staging.slots[0]
        assert len(slot.targets) > 0
        assert all(slot.is_pinned(target) for target in slot.targets)
        page = mmap.PAGESIZE
        for path, image in slot._images.items():
            own = {number for start, stop in slot._own[path] if start < stop
                   for number in range(start // page, -(-stop // page))}  # fmt: skip
            locked = {number for number in range(-(-image.numel() // page)) if is_locked(slot, path, number * page)}
            assert own <= locked
            assert all(number in own or {number - 1, number + 1} <= own for number in locked)


def read(path: Path | Url) -> dict[str, torch.Tensor]:
    assert isinstance(path, Path)
    return dict(load_file(path / "adapter_model.safetensors"))
