"""CUDA's runtime library as torch has loaded it: for what torch has no call for, or one with effects on the training.

A graph of copies is built node by node, not captured from a stream: decision 0038 says why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

import torch

_DEVICE_TO_HOST = 2  # cudaMemcpyDeviceToHost
_RELAXED = 2  # cudaStreamCaptureModeRelaxed

# As cuda_runtime_api.h of CUDA 11.4 to 13 declares them. A handle is a pointer.
_SIGNATURES: dict[str, list[Any]] = {
    "cudaGraphCreate": [POINTER(c_void_p), c_uint],
    "cudaGraphAddMemcpyNode1D": [
        POINTER(c_void_p), c_void_p, POINTER(c_void_p), c_size_t, c_void_p, c_void_p, c_size_t, c_int,
    ],
    "cudaGraphInstantiateWithFlags": [POINTER(c_void_p), c_void_p, c_ulonglong],
    "cudaGraphLaunch": [c_void_p, c_void_p],
    "cudaGraphDestroy": [c_void_p],
    "cudaGraphExecDestroy": [c_void_p],
    "cudaThreadExchangeStreamCaptureMode": [POINTER(c_int)],
    "cudaGetLastError": [],
}  # fmt: skip


class CudaError(Exception):
    """A call was refused; CUDA's memory of it is cleared."""


class CopyGraph:
    """Copies that are launched together. Not to be launched by two threads at once."""

    def __init__(self, graphs: Graphs, executable: c_void_p) -> None:
        self._graphs = graphs
        self._executable = executable

    def launch(self, stream: int) -> None:
        """Queue all copies on `stream`, one behind the other. Raises CudaError; then none is queued."""
        self._graphs.call("cudaGraphLaunch", self._executable, stream)

    def close(self) -> None:
        """Free it. A launch that is under way ends as it would have."""
        if self._executable:
            executable, self._executable = self._executable, c_void_p()
            self._graphs.call("cudaGraphExecDestroy", executable)


class Graphs:
    """Makes graphs of copies from a device into page-locked memory. Neither allocates from torch's memory pools nor
    touches a stream, torch's random numbers, or a capture that is under way.

    Raises OSError or AttributeError if the library at `path` cannot be loaded or is too old.
    """

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        # A node takes a microsecond. To let go of the GIL for each would mean to queue for it thousands of times.
        held = ctypes.PyDLL(path)
        self._calls: dict[str, Any] = {}
        for name, arguments in _SIGNATURES.items():
            function = getattr(held if name == "cudaGraphAddMemcpyNode1D" else self._library, name)
            function.argtypes, function.restype = arguments, c_int
            self._calls[name] = function
        self._library.cudaGetErrorName.argtypes, self._library.cudaGetErrorName.restype = [c_int], c_char_p

    def build(self, device: torch.device, copies: Iterable[tuple[int, int, int]]) -> CopyGraph:
        """A graph of `copies`: the address of the target, that of the source on `device`, and bytes. They run in this
        order. Raises CudaError."""
        graph, executable, last = c_void_p(), c_void_p(), c_void_p()
        with torch.cuda.device(device):
            self.call("cudaGraphCreate", byref(graph), 0)
            try:
                for number, (target, source, nbytes) in enumerate(copies):
                    node = c_void_p()
                    before = (byref(last), 1) if number else (None, 0)
                    arguments = byref(node), graph, *before, target, source, nbytes, _DEVICE_TO_HOST
                    self.call("cudaGraphAddMemcpyNode1D", *arguments)
                    last = node
                self.call("cudaGraphInstantiateWithFlags", byref(executable), graph, 0)
            finally:
                self._calls["cudaGraphDestroy"](graph)
        return CopyGraph(self, executable)

    def relax_this_thread(self) -> None:
        """What this thread calls from now on does not end a capture that another thread has under way. The thread must
        have a current device, or it gets a context on the first one."""
        self.call("cudaThreadExchangeStreamCaptureMode", byref(c_int(_RELAXED)))

    def call(self, name: str, *arguments: Any) -> None:
        error = self._calls[name](*arguments)
        if error:
            self._calls["cudaGetLastError"]()  # or torch would raise it after its next kernel, far from here
            kind = (self._library.cudaGetErrorName(error) or b"unknown").decode()
            raise CudaError(f"{name}: {kind} ({error})")


def find_graphs() -> Graphs | None:
    """None where torch has not loaded a CUDA runtime that has all of it: on other vendors' devices, for one."""
    for path in _paths():
        try:
            return Graphs(path)
        except (OSError, AttributeError):
            continue
    return None


def forget_error() -> None:
    """CUDA keeps the last error, and torch would raise it after its next kernel, far from here."""
    for path in _paths():
        ctypes.CDLL(path).cudaGetLastError()


def _paths() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return list(dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if "libcudart" in line))
