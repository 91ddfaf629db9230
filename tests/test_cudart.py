"""Calls into CUDA's library, compiled here with NVIDIA's prototypes over the host's memory: what goes in, what comes
out, and what is left behind when one of them fails."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt.batch import Batch
from async_ckpt.cudart import CudaError, Graphs, find_graphs
from async_ckpt.launch import Launcher

COMPILER = shutil.which("cc")
DEVICE = torch.device("cuda", 0)
STREAM = 0x7FFF_1234_5678  # a pointer: longer than an int

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    library = tmp_path_factory.mktemp("cudart") / "libstub.so"
    source = Path(__file__).parent / "cudart_stub.c"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), str(source)], check=True)
    return str(library)


class Stub:
    """The library's own view of itself."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.launches = self.number("stub_launches")

    def number(self, name: str) -> int:
        return ctypes.c_size_t.in_dll(self.library, name).value

    def fail(self, name: str) -> None:
        self._kept = name.encode()
        self.library.stub_fail(self._kept)

    def left(self) -> tuple[int, int, int]:
        """Graphs, executables, and the error that the next kernel would find."""
        return self.number("stub_graphs"), self.number("stub_executables"), self.library.stub_peek()


@pytest.fixture
def stub(path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stub = Stub(path)
    yield stub
    stub.fail("")
    assert stub.left() == (0, 0, 0)


def pairs(count: int) -> Batch:
    sources = [torch.randn(number % 7 + 1) for number in range(count)]
    return [torch.zeros_like(source) for source in sources], sources


def copies(batch: Batch) -> list[tuple[int, int, int]]:
    return [(target.data_ptr(), source.data_ptr(), source.nbytes) for target, source in zip(*batch, strict=True)]


def test_a_graph_copies_in_order_what_lies_there_at_the_launch(path: str, stub: Stub) -> None:
    batch = pairs(2000)
    graph = Graphs(path).build(DEVICE, copies(batch))
    assert stub.left() == (0, 1, 0)
    assert not any(bool(target.any()) for target in batch[0])
    for _ in range(2):
        for source in batch[1]:
            source.normal_()
        graph.launch(STREAM)
        assert all(map(torch.equal, *batch))
    assert stub.number("stub_stream") == STREAM
    assert stub.number("stub_launches") == stub.launches + 2
    graph.close()
    graph.close()


@pytest.mark.parametrize("name", ["cudaGraphCreate", "cudaGraphAddMemcpyNode1D", "cudaGraphInstantiateWithFlags"])
def test_what_fails_leaves_nothing_behind(path: str, stub: Stub, name: str) -> None:
    stub.fail(name)
    with pytest.raises(CudaError, match=rf"{name}: cudaErrorMemoryAllocation \(2\)"):
        Graphs(path).build(DEVICE, copies(pairs(3)))
    assert stub.left() == (0, 0, 0)


def test_the_mode_of_a_thread_is_relaxed(path: str, stub: Stub) -> None:
    Graphs(path).relax_this_thread()
    assert stub.number("stub_mode") == 2


def test_without_a_runtime_there_are_no_graphs(tmp_path: Path, stub: Stub) -> None:
    if not torch.cuda.is_available():
        assert find_graphs() is None
    empty = tmp_path / "empty.so"
    subprocess.run([str(COMPILER), "-shared", "-o", str(empty), "-x", "c", "/dev/null"], check=True)
    with pytest.raises(AttributeError):
        Graphs(str(empty))


class Slot:
    index = 0

    def is_pinned(self, view: torch.Tensor) -> bool:
        return True


@pytest.mark.parametrize("name", ["cudaGraphAddMemcpyNode1D", "cudaGraphLaunch"])
def test_a_save_is_whole_whatever_fails(
    path: str, stub: Stub, name: str, caplog: pytest.LogCaptureFixture, foreach: Callable[[Batch], None]
) -> None:
    launcher, batch = Launcher(Graphs(path), foreach), pairs(100)
    for number in range(6):
        if number == 1 and name == "cudaGraphAddMemcpyNode1D":
            stub.fail(name)
        if number == 3 and name == "cudaGraphLaunch":
            stub.fail(name)
        for target, source in zip(*batch, strict=True):
            source.normal_()
            target.zero_()
        launcher.start(Slot(), DEVICE, batch, STREAM)
        assert all(map(torch.equal, *batch))
        launcher.settle()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{name}: cudaErrorMemoryAllocation (2). Without ASYNC_CKPT_CUDA_GRAPH=1" in caplog.text
    assert stub.number("stub_launches") - stub.launches == (1 if name == "cudaGraphLaunch" else 0)
    launcher.close()


@pytest.fixture
def foreach() -> Callable[[Batch], None]:
    def copy(batch: Batch) -> None:
        torch._foreach_copy_(*batch)

    return copy
