"""What tests of several parts of the saver share."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_ckpt.core.slots import read_journals, remove_run
from tests.saver.committing import make_image
from tests.saver.doors import Doors
from tests.saver.saver_process import SaverProcess


@pytest.fixture
def endpoint() -> Iterator[str]:
    name = f"ipc:///nowhere/{secrets.token_hex(6)}"
    yield name
    left = list(read_journals(name))
    for run, _ in left:
        remove_run(run)
    assert left == []


@pytest.fixture
def home() -> Iterator[Path]:
    """Short, for Unix sockets, and 0700."""
    with tempfile.TemporaryDirectory(prefix="ackpt-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def saver(home: Path) -> Iterator[SaverProcess]:
    with SaverProcess(f"ipc://{home}/s", home, home / "log") as process:
        yield process
    assert list(read_journals(process.endpoint)) == []


@pytest.fixture
def doors(home: Path) -> Doors:
    return Doors(home)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "image", adapter_bytes=(1 << 20) + 17)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"
