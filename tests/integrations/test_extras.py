"""Without its library an integration says which extra brings it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.ranks import ROOT
from tests.system.processes import environment


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("transformers", "transformers.trainer_utils", "transformers"),
        ("llama_cookbook", "llama_cookbook", "llama_cookbook"),
        ("lightning", "lightning", "lightning"),
        ("lightning", "torch", "lightning"),
        ("trainer_callback", "transformers", "transformers"),
    ],
)
def test_the_extra_is_named(module: str, missing: str, extra: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import async_ckpt.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: async_ckpt.integrations.{extra}: "), done.stderr
    assert last.endswith(f"pip install 'async-ckpt[{extra}]'")
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
