"""Integrations and object stores: what writes files of its own beside the checkpoints says so, and makes no `s3:`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from async_ckpt import CheckpointError
from async_ckpt.core.location import Url

_URL = "s3://bucket/run"


@pytest.fixture(autouse=True)
def _nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_trainer(tmp_path: Path) -> None:
    from async_ckpt.integrations.common import check_start, export

    with pytest.raises(CheckpointError, match="output_dir needs a directory of this host, s3://bucket/run is in"):
        check_start(_URL, 0, "resume")
    with pytest.raises(CheckpointError, match="exporting the weights needs a directory of this host"):
        export(torch.nn.Linear(1, 1), _URL, rank=0)
    assert list(tmp_path.iterdir()) == []


def test_lightning_goes_there() -> None:
    pytest.importorskip("lightning")
    from async_ckpt.integrations.lightning import AsyncCheckpoint

    assert AsyncCheckpoint(_URL).directory == Url(_URL)
    assert AsyncCheckpoint("runs/lora").directory == Path("runs/lora")
