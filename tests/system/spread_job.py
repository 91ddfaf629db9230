"""A rank that torchrun starts: `spread_job.py FOLDER KIND`."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.system.spread import saves, tell

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    tell(Path(sys.argv[1]), 2)
    saves(sys.argv[1], sys.argv[2], "2")
    dist.barrier()
    os._exit(0)  # tearing gloo down may abort
