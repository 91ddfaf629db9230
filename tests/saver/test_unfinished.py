"""What a saver notes of uploads that outlive their run, and what the next one on its endpoint finds of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from async_ckpt.core.protocol import Options
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import endpoint_key, read_journals, shm_root
from async_ckpt_saver.unfinished import Unfinished


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    yield f"ipc://{tmp_path}/s"
    for path in notes(f"ipc://{tmp_path}/s"):
        path.unlink()


def notes(endpoint: str) -> list[Path]:
    return list(shm_root().glob(f"uploads-{endpoint_key(endpoint)}-*"))


def options(directory: str, url: str = "s3://bucket/run", **changes: object) -> Options:
    return Options(directory, 2, 2, Policy(keep_last=3), 60.0, upload_to=url, **changes)  # type: ignore[arg-type]


def test_the_next_saver_of_the_endpoint_finds_each_directory_once_and_nobody_else_does(
    endpoint: str, tmp_path: Path
) -> None:
    noted = [options("/a"), options("/b"), options("/a", "s3://bucket/other")]
    for each in noted:
        Unfinished(endpoint).note(options(each.directory, each.upload_to, replicas=1))
        Unfinished(endpoint).note(each)  # the newest rules stand
    assert sorted(map(repr, Unfinished(endpoint).found())) == sorted(map(repr, noted))
    assert Unfinished(f"ipc://{tmp_path}/other").found() == []
    assert list(read_journals(endpoint)) == []  # it is no run
    Unfinished(endpoint).forget(noted[0])
    Unfinished(endpoint).forget(noted[0])
    assert sorted(map(repr, Unfinished(endpoint).found())) == sorted(map(repr, noted[1:]))
    assert {path.stat().st_mode & 0o777 for path in notes(endpoint)} == {0o600}


def test_what_cannot_be_read_or_was_not_written_to_its_end_is_removed(endpoint: str) -> None:
    Unfinished(endpoint).note(options("/a"))
    [whole] = notes(endpoint)
    for other in (whole.with_name(f"{whole.name}.tmp"), whole.with_name(f"{whole.name[:-1]}z")):
        other.write_bytes(whole.read_bytes()[:-3] if other.suffix != ".tmp" else whole.read_bytes())
    assert [each.directory for each in Unfinished(endpoint).found()] == ["/a"]
    assert notes(endpoint) == [whole]
