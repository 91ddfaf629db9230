"""Real training ranks for tests: one process each, joined by gloo on this host's CPUs.

`run_ranks("tests.sharding.test_fsdp1:check", 3)` runs `check()` on three ranks; `run_ranks("job.py", 2, "--lr", "1")`
runs a script, which joins the process group itself, as under torchrun. `run_cases` runs many cases in one launch, for
starting a rank takes seconds and building a tiny model takes none.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class RanksError(AssertionError):
    """A rank failed or all of them took too long; holds what every rank printed."""


def run_ranks(
    target: str, world: int, *args: str, timeout_s: float = 120.0, env: Mapping[str, str] | None = None
) -> list[str]:
    """Run `target` ("module:function" or a script's path) on `world` ranks; returns what each of them printed.

    No process is left behind. Raises RanksError if a rank exits with another status than 0 or after `timeout_s`.
    """
    command = [sys.executable, "-m", "tests.ranks", target, *args]
    if target.endswith(".py"):
        command = [sys.executable, target, *args]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank-{rank}.log") for rank in range(world)]
        common = _environment(world) | dict(env or {})
        processes = []
        try:
            for rank, log in enumerate(logs):
                with log.open("wb") as output:
                    processes.append(
                        subprocess.Popen(
                            command,
                            cwd=ROOT,
                            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            problem = _wait(processes, timeout_s)
        finally:
            for process in processes:
                _kill(process)
        outputs = [log.read_text(errors="replace") for log in logs]
    if problem:
        printed = "\n".join(f"--- rank {rank}\n{output[-6000:]}" for rank, output in enumerate(outputs))
        raise RanksError(f"{target} on {world} ranks: {problem}\n{printed}")
    return outputs


def run_cases(module: str, names: Sequence[str], world: int, timeout_s: float) -> dict[str, str]:
    """Run these of the functions that `module` holds in its `CASES`, on `world` ranks in one launch.

    Returns the tracebacks of each case that failed on any rank, "" for each that passed. Raises RanksError if the
    launch itself fails, as it does when ranks fail so differently that they no longer understand each other.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        run_ranks("tests.ranks:several_cases", world, module, str(report), *names, timeout_s=timeout_s)
        results: dict[str, str] = json.loads(report.read_text())
    assert list(results) == list(names)
    return results


def several_cases(module: str, report: str, *names: str) -> None:
    """One rank's side of `run_cases`."""
    import pytest
    import torch.distributed as dist

    results: dict[str, str] = {}
    for name in names:
        failure = ""
        try:
            importlib.import_module(module).CASES[name]()
        except (Exception, pytest.fail.Exception):
            failure = f"rank {dist.get_rank()}: {traceback.format_exc()}"
            print(f"{name}: {failure}", flush=True)
        failures: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        results[name] = "".join(failures)
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(results))


def _environment(world: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "service"), os.environ.get("PYTHONPATH", "")]),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _wait(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> str:
    """Why the launch failed, or "". Ranks whose peer is dead would wait for it until gloo gives up: not longer."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        statuses = [process.poll() for process in processes]
        if any(statuses):
            time.sleep(1.0)  # let the others say what they saw
            return f"exit statuses {[process.poll() for process in processes]}"
        if all(status == 0 for status in statuses):
            return ""
        if time.monotonic() > deadline_s:
            return f"not done after {timeout_s} s, exit statuses {statuses}"
        time.sleep(0.05)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _main(target: str, *args: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(*args)
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # tearing down gloo under FSDP1 may abort


if __name__ == "__main__":
    _main(*sys.argv[1:])
