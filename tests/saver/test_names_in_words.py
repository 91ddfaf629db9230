"""Storage is reached through descriptors; people are told the names that they know."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.protocol import Settled, Staged
from async_ckpt.core.retention_policy import Policy
from async_ckpt_saver import filesystem
from async_ckpt_saver.local_storage import LocalStorage, below_root
from async_ckpt_saver.naming import NamingFormatter
from async_ckpt_saver.writer import CommitError
from tests.saver.committing import job_of, make_image
from tests.saver.hub_bench import stage
from tests.saver.saver_process import Peer, SaverProcess


def broken(*arguments: object, **more: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), *map(str, arguments[:1]))


def test_a_process_names_its_directories_in_its_log_and_its_answers(tmp_path: Path) -> None:
    """`latest` is a directory here, so it cannot be moved; and step 2 is there already, somebody else's."""
    run = tmp_path / "run"
    (run / "latest").mkdir(parents=True)
    (run / "checkpoint-2").mkdir()
    endpoint = f"ipc://{tmp_path}/s"
    with SaverProcess(endpoint, tmp_path, tmp_path / "log") as saver, Peer(endpoint) as peer:
        granted = peer.start(run)
        reasons = []
        for step in (1, 2):
            stage(granted, 0, 0, step)
            peer.say(Staged(seq=step, slot=0, step=step, copy_s=0.1))
            reasons.append(peer.hear(Settled).reason)
    log = saver.said()
    assert f"{run}/latest was not moved" in log
    assert f"{run}/checkpoint-2 exists already" in reasons[1]
    assert "/proc/self/fd" not in log + "".join(reasons)


@pytest.mark.parametrize("what", ["sweep", "retain", "commit"])
def test_a_reason_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    run, image = tmp_path / "run", make_image(tmp_path / "image", adapter_bytes=5000)
    run.mkdir()
    storage = LocalStorage(str(run), tmp_path)
    monkeypatch.setattr(filesystem.os, "fsync", broken)
    monkeypatch.setattr(os, "scandir", broken)
    calls: dict[str, Callable[[], object]] = {
        "commit": lambda: storage.commit_once(job_of(run, 1, image), lambda: True),
        "sweep": storage.sweep,
        "retain": lambda: storage.retain(Policy(keep_last=1)),
    }
    with pytest.raises((CheckpointError, OSError)) as caught:
        calls[what]()
    assert "/proc/self/fd" not in str(caught.value)
    assert str(run) in str(caught.value)
    if isinstance(caught.value, CommitError):
        assert caught.value.reason == str(caught.value)
        assert caught.value.errno == errno.EIO


def test_an_error_of_the_system_names_the_directory_and_stays_what_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with below_root(str(run), tmp_path) as place:
        os.mkdir(f"{place}/a")
    with pytest.raises(FileExistsError) as caught, below_root(str(run), tmp_path) as place:
        os.mkdir(f"{place}/a")
    assert caught.value.filename == f"{run}/a"
    with pytest.raises(FileNotFoundError) as lost, below_root(str(run), tmp_path) as place:
        os.rename(f"{place}/b", f"{place}/c")
    assert (lost.value.filename, lost.value.filename2) == (f"{run}/b", f"{run}/c")


def test_a_line_of_the_log_whose_descriptor_is_closed_is_left_as_it_is() -> None:
    formatter = NamingFormatter("%(message)s")
    record = logging.LogRecord("a", logging.INFO, "", 0, "see /proc/self/fd/987654/latest and %s", ("more",), None)
    assert formatter.format(record) == "see /proc/self/fd/987654/latest and more"
