"""What each side may import: the saver runs where there is no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_REPORT = "import sys; print(sorted({'torch', 'numpy', 'peft', 'transformers', 'pickle'} & set(sys.modules)))"


@pytest.mark.parametrize(
    "statement",
    [
        "import async_ckpt; async_ckpt.latest('/nonexistent'); async_ckpt.CheckpointError",
        "import async_ckpt_saver.cli, async_ckpt_saver.server, uvloop",
    ],
)
def test_no_torch_and_no_numpy(statement: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}; {_REPORT}"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert set(eval(done.stdout)) <= {"pickle"}  # multiprocessing's and logging's own


def test_the_saver_imports_nothing_of_the_trainers_side_but_core() -> None:
    files = sorted((ROOT / "service" / "async_ckpt_saver").rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for line in file.read_text().splitlines():
            if line.strip().startswith(("from async_ckpt.", "from async_ckpt ", "import async_ckpt")):
                assert line.strip().startswith(("from async_ckpt.core", "from async_ckpt_saver")), f"{file}: {line}"


def test_core_imports_nothing_above_it() -> None:
    files = sorted((ROOT / "async_ckpt" / "core").glob("*.py"))
    assert len(files) > 5
    for file in files:
        text = file.read_text()
        assert "from .." not in text, file
        assert "import torch" not in text, file


def test_the_wall_clock_is_told_to_people_and_decides_nothing() -> None:
    """It jumps, and time stamps of files follow it. It is read for the date in a manifest, and for what people see,
    traces among it."""
    readings = re.compile(r"time\.time\b|time_ns\b|datetime|CLOCK_REALTIME|st_[acm]time|getmtime|getctime")
    files = [*(ROOT / "async_ckpt").rglob("*.py"), *(ROOT / "service").rglob("*.py")]
    assert len(files) > 30
    found = [f"{file.name}: {line.strip()}" for file in files for line in file.read_text().splitlines()
             if readings.search(line) and line != "from datetime import timedelta"]  # fmt: skip
    assert sorted(found) == ["clock.py: unix_ns = time.time_ns()", "manifest_writing.py: created_unix_s=time.time(),",
                             "status.py: return time.time()"]  # fmt: skip


def test_attach_without_torch_names_the_extra() -> None:
    code = "import sys; sys.modules['torch'] = None; import async_ckpt; async_ckpt.attach"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "pip install 'async-ckpt[train]'" in done.stderr
