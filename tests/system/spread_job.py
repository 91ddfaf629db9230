"""A rank that torchrun starts: `spread_job.py FOLDER FUNCTION ARGUMENTS`, of `spread.py`."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.system import spread

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    spread.tell(Path(sys.argv[1]), 2)
    getattr(spread, sys.argv[2])(sys.argv[1], *sys.argv[3:])
    dist.barrier()
    os._exit(0)  # tearing gloo down may abort
