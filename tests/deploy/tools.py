"""What the files of deploy/ are checked with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def tool(name: str, where_from: str) -> str:
    """The path of a program. Without it the test is skipped, but not in CI, which has to install it."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        missing = f"{name} is not here: {where_from}"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def promtool(*arguments: str, cwd: Path = DEPLOY / "prometheus") -> str:
    """What it printed. Raises AssertionError with it if it was not content."""
    done = subprocess.run(
        [tool("promtool", "make tools"), *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def saver_environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "service")])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ASYNC_CKPT_")}
    return {**inherited, "PYTHONPATH": path, **more}


def knows_option(option: str) -> bool:
    command = [sys.executable, "-m", "async_ckpt_saver", "run", "--help"]
    done = subprocess.run(command, env=saver_environment(), capture_output=True, text=True, check=True)
    return option in done.stdout
