"""What the hardware allows: the same bytes, moved by the simplest program there is."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from pathlib import Path

import torch

_CHUNK_BYTES = 8 << 20


class Memcpy:
    """One flat copy between two buffers whose pages are mapped already."""

    def __init__(self, nbytes: int) -> None:
        self._source = torch.ones(nbytes, dtype=torch.uint8)
        self._target = torch.zeros(nbytes, dtype=torch.uint8)

    def run(self) -> float:
        started_s = time.perf_counter()
        self._target.copy_(self._source)
        return time.perf_counter() - started_s


class SequentialWrite:
    """One new file of `nbytes`, written by one thread from memory, then fdatasync."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._buffer = mmap.mmap(-1, self._nbytes)
        for offset in range(0, self._nbytes, _CHUNK_BYTES):
            chunk = min(_CHUNK_BYTES, self._nbytes - offset)
            self._buffer[offset : offset + chunk] = os.urandom(1 << 16) * (chunk >> 16) + b"x" * (chunk % (1 << 16))

    def run(self, path: Path, *, direct: bool) -> float:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
        started_s = time.perf_counter()
        fd = os.open(path, flags, 0o600)
        try:
            with memoryview(self._buffer) as view:
                for offset in range(0, self._nbytes, _CHUNK_BYTES):
                    os.pwrite(fd, view[offset : offset + _CHUNK_BYTES], offset)
            os.fdatasync(fd)
        finally:
            os.close(fd)
        return time.perf_counter() - started_s

    def close(self) -> None:
        self._buffer.close()


class Dd:
    """`dd oflag=direct conv=fdatasync` out of /dev/shm, as anybody can run it."""

    def __init__(self, nbytes: int) -> None:
        path = Path(f"/dev/shm/async-ckpt-bench-{os.getpid()}")
        self._source = path.open("xb")
        path.unlink()  # gone with this process, however that ends
        megabyte = os.urandom(1 << 20)
        for _ in range(-(-nbytes // len(megabyte))):
            self._source.write(megabyte)
        self._source.flush()

    def run(self, path: Path) -> float:
        source = f"/proc/{os.getpid()}/fd/{self._source.fileno()}"
        command = ["dd", f"if={source}", f"of={path}", "bs=8M", "oflag=direct", "conv=fdatasync", "status=none"]
        started_s = time.perf_counter()
        subprocess.run(command, check=True)
        return time.perf_counter() - started_s

    def close(self) -> None:
        self._source.close()
