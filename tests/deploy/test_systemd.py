"""The unit, as systemd itself reads it; what it promises of notifications is in tests/saver/test_notify.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.deploy.tools import DEPLOY, tool

_UNIT = DEPLOY / "systemd" / "async-ckpt-saver.service"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that is on this machine."""
    text = _UNIT.read_text()
    assert text.count("ExecStart=/opt/async-ckpt/bin/async-ckpt-saver run") == 1
    path = tmp_path / _UNIT.name
    path.write_text(text.replace("/opt/async-ckpt/bin/async-ckpt-saver", "/bin/true"))
    return path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("systemd-analyze", "it comes with systemd"), *arguments], capture_output=True, text=True
    )


def test_systemd_has_nothing_to_say_about_it(unit: Path) -> None:
    done = analyze("verify", str(unit))
    assert (done.returncode, done.stderr) == (0, ""), "an unknown key is told on stderr alone"


def test_a_key_that_systemd_does_not_know_would_be_told(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdogSeconds="))
    assert "WatchdogSeconds" in analyze("verify", str(unit)).stderr


def test_its_exposure_is_low(unit: Path) -> None:
    done = analyze("security", "--offline=yes", "--threshold=17", "--no-pager", str(unit))
    assert done.returncode == 0, done.stdout[-2000:]
