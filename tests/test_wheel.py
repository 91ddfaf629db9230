"""The wheel: what is in it, and that it works where nothing else is installed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.ranks import ROOT
from tests.saver.checkpoints import commit_checkpoint
from tests.system.processes import until

_PACKAGES = {"async_ckpt": ROOT / "async_ckpt", "async_ckpt_saver": ROOT / "service/async_ckpt_saver"}
_KINDS = {".py", ".typed", ".html", ".css", ".js", ".svg"}
_NO_INDEX = ("NewConnectionError", "ConnectTimeoutError", "ProxyError", "from versions: none")
_LARGEST_BYTES = 30_000_000  # 18 MB, when this was written


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    [built] = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Iterator[Path]:
    """The folder of a new environment with the wheel and what it depends on. Its path is short: it holds a socket."""
    with tempfile.TemporaryDirectory(prefix="ackpt-wheel-", dir="/tmp") as name:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", name], check=True)
        _pip("--python", Path(name, "bin/python"), "install", "--no-compile", wheel)
        yield Path(name)


def _pip(*words: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if os.environ.get("CI") != "true" and any(mark in done.stderr for mark in _NO_INDEX):
        pytest.skip(f"no package index to install from: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def _run(installed: Path, *words: object, status: int = 0) -> str:
    """What a program of the environment prints."""
    done = subprocess.run(
        [str(installed / "bin" / str(words[0])), *map(str, words[1:])],
        cwd=installed, env=_environment(installed), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _environment(installed: Path) -> dict[str, str]:
    return {"PATH": f"{installed}/bin:/usr/bin:/bin", "HOME": str(installed), "TMPDIR": str(installed)}


def _site_packages(installed: Path) -> Path:
    [found] = installed.glob("lib/python*/site-packages")
    return found


def _metadata(installed: Path) -> list[str]:
    [found] = _site_packages(installed).glob("async_ckpt-*.dist-info/METADATA")
    return found.read_text().splitlines()


def test_it_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    described = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in _PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(expected) > 100
    assert names - described == expected
    assert {Path(name).suffix for name in expected} <= _KINDS
    assert {"async_ckpt/py.typed", "async_ckpt_saver/py.typed"} <= expected
    assert any(name.endswith("/licenses/LICENSE") for name in described)


def test_it_brings_the_base_dependencies_and_no_more(installed: Path) -> None:
    site = _site_packages(installed)
    found = {path.name.split("-")[0].lower().replace("_", "-") for path in site.glob("*.dist-info")}
    asked = [
        Requirement(line.partition(": ")[2]) for line in _metadata(installed) if line.startswith("Requires-Dist: ")
    ]
    base = {each.name for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})}
    assert len(base) >= 4
    assert found == base | {"async-ckpt"}
    assert not (site / "torch").exists()
    assert not (site / "numpy").exists()
    size_bytes = sum(path.lstat().st_size for path in site.rglob("*") if path.is_file())
    print(f"site-packages: {size_bytes / 1e6:.1f} MB: {', '.join(sorted(found))}")
    assert size_bytes < _LARGEST_BYTES


def test_the_saver_runs_until_it_is_told_to_stop(installed: Path) -> None:
    assert "Commits the checkpoints" in _run(installed, "async-ckpt-saver", "--help")
    endpoint = f"ipc://{installed}/d/saver.sock"
    command = [str(installed / "bin/async-ckpt-saver"), "run", "--bind", endpoint, "--root", str(installed),
               "--http", "127.0.0.1:0"]  # fmt: skip
    log = installed / "log"
    with log.open("wb") as file, subprocess.Popen(command, env=_environment(installed), stderr=file) as saver:
        try:
            page = until(lambda: re.search(r"http://\S+", log.read_text()) or saver.poll() is not None, "its address")
            assert isinstance(page, re.Match), log.read_text()
            for path in ("", "page.css", "page.js", "icon.svg", "metrics", "readyz"):
                with urllib.request.urlopen(page.group() + path, timeout=30) as answer:
                    assert answer.read()
            status = json.loads(_run(installed, "async-ckpt-saver", "status", "--bind", endpoint, "--json"))
            assert (status["pid"], status["runs"]) == (saver.pid, [])
            libraries = Path(f"/proc/{saver.pid}/maps").read_text()
            assert str(_site_packages(installed)) in libraries
            assert str(ROOT) not in libraries
        finally:
            saver.terminate()
        assert saver.wait(30) == -signal.SIGTERM, log.read_text()


def test_checkpoints_are_found_and_verified(installed: Path, tmp_path: Path) -> None:
    commit_checkpoint(tmp_path / "run", 7, tmp_path)
    asked = "import sys, async_ckpt; print(async_ckpt.latest(sys.argv[1]), async_ckpt.__file__)"
    path, _, file = _run(installed, "python", "-c", asked, tmp_path / "run").strip().rpartition(" ")
    assert path == str(tmp_path / "run/checkpoint-7")
    assert file.startswith(str(installed))
    assert _run(installed, "async-ckpt-saver", "verify", tmp_path / "run").startswith("ok  ")


@pytest.mark.parametrize(
    ("statement", "error", "extra"),
    [
        ("import async_ckpt; async_ckpt.attach", "async_ckpt.core.errors.CheckpointError", "train"),
        ("import async_ckpt; async_ckpt.latest('s3://bucket/run')", "async_ckpt.core.errors.CheckpointError", "cloud"),
        ("import async_ckpt.integrations.transformers", "ImportError", "transformers"),
        ("import async_ckpt.integrations.lightning", "ImportError", "lightning"),
        ("import async_ckpt.integrations.llama_cookbook", "ImportError", "llama_cookbook"),
    ],
)
def test_what_needs_more_names_the_extra_that_brings_it(
    installed: Path, statement: str, error: str, extra: str
) -> None:
    last = _run(installed, "python", "-c", statement, status=1).strip().splitlines()[-1]
    assert last.startswith(f"{error}: ")
    assert last.endswith(f"pip install 'async-ckpt[{extra}]'")
    assert f"Provides-Extra: {extra.replace('_', '-')}" in _metadata(installed)
