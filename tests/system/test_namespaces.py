"""A saver and ranks in pid namespaces of their own, as in containers of one pod with a shared /dev/shm."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import async_ckpt
from tests.system.processes import Daemon, environment, runs_of, until

_OWN_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL"]


def _possible() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*_OWN_NAMESPACE, "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not _possible(), reason="needs the right to make pid namespaces (root)")

_RANK = """
import os, signal, sys
import torch
from peft import LoraConfig, get_peft_model
import async_ckpt

directory, endpoint, step, end = sys.argv[1:]
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
ckpt = async_ckpt.attach(model, directory=directory, saver=endpoint, timeout_s=100)
resumed = ckpt.restore()
print("pid", os.getpid(), "resumed", resumed and (resumed.step, resumed.source), flush=True)
ckpt.save(int(step)).staged()
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
ckpt.close()
"""


def rank(directory: Path, endpoint: str, step: int, end: str) -> subprocess.CompletedProcess[str]:
    """A whole life of one rank in a pid namespace of its own, where its pid is 2: one that the saver's has as well."""
    command = [*_OWN_NAMESPACE, "sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", _RANK, str(directory)]
    return subprocess.run(
        [*command, endpoint, str(step), end], env=environment(), capture_output=True, text=True, timeout=120
    )


@contextlib.contextmanager
def saver(folder: Path) -> Iterator[Daemon]:
    """In a namespace of its own, where pid 2 lives as long as it does. unshare heeds SIGKILL alone."""
    daemon = Daemon(folder / "d", folder, wrapper=[*_OWN_NAMESPACE, "sh", "-c", 'sleep infinity & "$@"; exit $?', "sh"])
    try:
        yield daemon.up()
    finally:
        daemon.stop(signal.SIGKILL)


def test_a_run_is_granted_and_its_pid_not_taken_for_one_of_the_savers(folder: Path) -> None:
    with saver(folder) as daemon:
        done = rank(folder / "run", daemon.endpoint, 1, "close")
        assert (done.returncode, done.stdout) == (0, "pid 2 resumed None\n"), done.stderr
        assert async_ckpt.latest(folder / "run") == folder / "run/checkpoint-1"
        until(lambda: not runs_of(folder), "the closed run is out of shared memory")


@pytest.mark.full
def test_a_dead_rank_is_noticed_by_its_lease_and_the_job_that_restarts_at_once_waits_for_it(folder: Path) -> None:
    with saver(folder) as daemon:
        done = rank(folder / "run", daemon.endpoint, 1, "kill")
        assert done.returncode == 128 + 9, done.stderr
        done = rank(folder / "run", daemon.endpoint, 2, "close")
        assert (done.returncode, done.stdout) == (0, "pid 2 resumed (1, 'ram')\n"), done.stderr
        assert async_ckpt.latest(folder / "run") == folder / "run/checkpoint-2"
        until(lambda: not runs_of(folder), "the closed run is out of shared memory")
