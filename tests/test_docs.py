"""What the pages tell the reader to run, runs, and says what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.system.processes import savers, until


def _blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no {language} block"
    return found


def _run(code: str, folder: Path, temporary: str) -> str:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "ASYNC_CKPT_SAVER"},
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "service")]),
        "TMPDIR": temporary,
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quickstart_runs_twice_and_prints_what_the_page_shows(tmp_path: Path) -> None:
    code = _blocks("docs/quickstart.md", "python")[0]
    first, second = _blocks("docs/quickstart.md", "text")[:2]
    with tempfile.TemporaryDirectory(prefix="ackpt-", dir="/tmp") as temporary:  # short, for it holds a socket
        assert _run(code, tmp_path, temporary) == first
        assert _run(code, tmp_path, temporary) == second
        until(lambda: not savers(Path(temporary)), "the savers have ended")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "async_ckpt.attaching.attach" in (tmp_path / "site/api/index.html").read_text()


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    assert len(pages) > 10
    assert [page for page in pages if page not in nav] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_top_pages_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
