"""Which rank this is, of which job: read once, at attach."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist

from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import Process

LEAD_VARIABLE = "ASYNC_CKPT_LEAD"  # tcp://HOST:PORT of rank 0's host, where its saver listens for those of other hosts
_JOB_VARIABLES = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Topology:
    """`job` is the same on all ranks of one launch and differs after a restart. `launcher` is the process that would
    restart the ranks (torchrun's agent), if there is one. `spans_hosts`: there are ranks on other hosts, or in
    containers with a /dev/shm of their own."""

    rank: int
    world: int
    job: str
    process: Process
    launcher: Process | None
    spans_hosts: bool = False


def discover() -> Topology:
    """Runs no collective, and asks nobody: the environment of torchrun, Slurm or mpirun says it, or ASYNC_CKPT_LEAD."""
    environment = os.environ
    if dist.is_available() and dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    else:
        rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    local_world = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or world)
    hosts = 1 if "LOCAL_WORLD_SIZE" in environment else int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    spans_hosts = world > 1 and (local_world != world or hosts > 1 or bool(environment.get(LEAD_VARIABLE)))
    launcher = process_of(os.getppid()) if "TORCHELASTIC_RUN_ID" in environment and os.getppid() > 1 else None
    job = ":".join(environment.get(name, "") for name in _JOB_VARIABLES)
    return Topology(rank, world, job, process_of(os.getpid()), launcher, spans_hosts)
