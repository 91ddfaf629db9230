"""Cases that need ranks and no folder: real processes joined by gloo on this host's CPUs, all cases in one launch."""

from __future__ import annotations

import importlib
import json
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class RanksError(AssertionError):
    """A rank failed or all of them took too long; holds what every rank printed."""


def run_cases(module: str, names: Sequence[str], world: int, timeout_s: float) -> dict[str, str]:
    """Run these of the functions that `module` holds in its `CASES`, on `world` ranks in one launch.

    Returns the tracebacks of each case that failed on any rank, "" for each that passed; if the launch itself fails, as
    it does when ranks fail so differently that they no longer understand each other, that for each case. No process is
    left behind.
    """
    from tests.system.processes import Job  # imports this module

    with tempfile.TemporaryDirectory() as folder:
        with Job("tests.ranks:several_cases", world, Path(folder), module, *names) as job:
            try:
                job.wait(timeout_s)
            except RanksError as error:
                return dict.fromkeys(names, f"the launch failed: {error}")
        results: dict[str, str] = json.loads(Path(folder, "report.json").read_text())
    assert list(results) == list(names)
    return results


def several_cases(folder: str, module: str, *names: str) -> None:
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
        Path(folder, "report.json").write_text(json.dumps(results))
