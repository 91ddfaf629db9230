from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_ckpt.core import holding
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.holding import BeingRead, is_read, reading, removing

_READER = """
import sys
from async_ckpt.core.holding import reading
with reading(sys.argv[1]):
    print("reading", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint-1"
    path.mkdir()
    (path / "async_ckpt.json").write_text("{}")
    return path


@pytest.fixture
def reader(checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is reading."""
    command = [sys.executable, "-c", _READER, str(checkpoint)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        yield process
        process.kill()


def test_what_a_process_reads_cannot_be_removed_until_it_is_killed(
    checkpoint: Path, reader: subprocess.Popen[str]
) -> None:
    assert is_read(checkpoint)
    with pytest.raises(BeingRead, match="checkpoint-1 is being read"), removing(checkpoint):
        raise AssertionError
    with reading(checkpoint):  # another reader is welcome
        reader.kill()
        reader.wait()
        assert is_read(checkpoint)
    assert not is_read(checkpoint)
    with removing(checkpoint):
        pass
    assert os.listdir(checkpoint) == ["async_ckpt.json"]


def test_what_was_removed_while_the_reader_waited_is_an_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remover renames it between the reader's open and its lock."""
    lock = fcntl.flock

    def late(fd: int, kind: int) -> None:
        checkpoint.rename(checkpoint.with_name("trash"))
        lock(fd, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(CheckpointError, match="was removed just now"), reading(checkpoint):
        raise AssertionError


def test_a_reader_waits_for_a_removal_and_then_reads(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came to nothing, because the rename failed."""
    waited = []
    with removing(checkpoint):
        monkeypatch.setattr(holding, "_WAIT_S", 0.0)
        with reading(checkpoint):
            waited.append(True)
    assert waited == [True]


def test_without_a_manifest_there_is_nothing_to_hold(tmp_path: Path) -> None:
    with reading(tmp_path / "none"):
        pass
    with pytest.raises(FileNotFoundError), removing(tmp_path):
        raise AssertionError
    assert not is_read(tmp_path)


def test_a_filesystem_without_flock_protects_nobody_and_says_so(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(fd: int, kind: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), reading(checkpoint), removing(checkpoint):
        pass
    assert "can be removed while they are read" in caplog.text
