"""async_ckpt, in its two modes, and with a saver to whom O_DIRECT is refused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import async_ckpt

from .shapes import Subject, total_bytes

_LARGE_BYTES = 4 << 20

_NO_DIRECT = """
import os, sys
opened = os.open
def refuse(path, flags, *rest, **named):
    if flags & os.O_DIRECT:
        raise OSError(22, os.strerror(22), path)
    return opened(path, flags, *rest, **named)
os.open = refuse
from async_ckpt_saver.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Overlap:
    title = "async_ckpt, overlap"
    durable = True
    staging: Literal["overlap", "sync"] = "overlap"

    def setup(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.folder = folder
        self.ckpt = async_ckpt.attach(
            subject.model, subject.optimizer, directory=folder, staging=self.staging, saver=self.endpoint()
        )
        self.pids = [self.saver_pid()] if dist.get_rank() == 0 else []
        self.handle: async_ckpt.SaveHandle | None = None
        # What a training loop does: some optimizer's step, whose pre-hook is the fence.
        self.tiny = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)

    def endpoint(self) -> str | None:
        return None

    def saver_pid(self) -> int:
        client = self.ckpt._client
        assert client._embedded is not None
        return int((client._embedded._home / "saver.sock.lock").read_text())

    def save(self, target: Path) -> None:
        self.handle = self.ckpt.save(int(target.name.rpartition("-")[2]))

    def fence(self) -> None:
        self.tiny.step()

    def wait(self) -> None:
        assert self.handle is not None
        self.handle.wait()

    def detached(self) -> list[int]:
        return self.pids

    def teardown(self) -> None:
        self.ckpt.close()


class Sync(Overlap):
    title = "async_ckpt, sync"
    staging = "sync"


class Buffered(Overlap):
    """The saver writes through the page cache, as it does by itself where a filesystem refuses O_DIRECT."""

    title = "async_ckpt, O_DIRECT refused"

    def endpoint(self) -> str:
        self.home = Path(os.environ.get("TMPDIR", tempfile.gettempdir())) / f"async-ckpt-bench-{os.getppid()}"
        endpoint = f"ipc://{self.home}/saver.sock"
        if dist.get_rank() == 0:
            self.home.mkdir(mode=0o700, exist_ok=True)
            command = [sys.executable, "-c", _NO_DIRECT, "run", "--bind", endpoint, "--root", str(self.folder)]
            with (self.home / "log").open("wb") as log:
                self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        return endpoint

    def saver_pid(self) -> int:
        return self.process.pid

    def teardown(self) -> None:
        super().teardown()
        if dist.get_rank() == 0:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
            written = (self.home / "log").read_text()
            # Small files, as in --quick, are never written by O_DIRECT.
            if total_bytes(self.subject) > _LARGE_BYTES:
                assert re.search("O_DIRECT is refused", written), "the fallback did not run"
            for path in self.home.iterdir():
                path.unlink()
            self.home.rmdir()
