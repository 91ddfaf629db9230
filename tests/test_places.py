"""attach's directory and tiers: two places, said in one way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Url
from async_ckpt.core.protocol import Settled, Uploaded
from async_ckpt.handle import SaveHandle
from async_ckpt.tiers import places_of


def test_a_directory_alone_has_no_second_tier(tmp_path: Path) -> None:
    found = places_of(tmp_path / "run", None)
    assert (found.given, found.first, found.second) == (tmp_path / "run", tmp_path / "run", None)
    assert places_of("s3://bucket/run/", None).first == Url("s3://bucket/run")


def test_tiers_are_a_directory_of_this_host_and_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = places_of("checkpoints", ["local", "s3://bucket/run/"])
    assert (found.given, found.first, found.second) == (Path("local"), tmp_path / "local", Url("s3://bucket/run"))
    assert places_of(tmp_path / "local", ("local", "gs://bucket")).second == Url("gs://bucket")
    assert places_of("checkpoints", ("local", tmp_path / "nfs")).second == tmp_path / "nfs"
    assert places_of("checkpoints", ("~/a", "s3://bucket")).first == Path.home() / "a"


@pytest.mark.parametrize(("directory", "tiers", "reason"), [
    ("checkpoints", "s3://bucket/run", "give two places"),
    ("checkpoints", ["/a"], "give two places"),
    ("checkpoints", ["/a", "/b", "s3://bucket"], "give two places"),
    ("checkpoints", ["s3://bucket/a", "s3://bucket/b"], "the first one is a directory of this host"),
    ("/c", ["/a", "s3://bucket/run"], "are two places: with tiers, leave directory out"),
    ("checkpoints", ["/a", "/a"], "one lies within the other"),
    ("checkpoints", ["/a", "/a/b"], "one lies within the other"),
    ("checkpoints", ["/a", "ftp://host/run"], "there is no storage for ftp"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_what_to_give(directory: str, tiers: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        places_of(directory, tiers)


def handle(*, second: bool = True) -> SaveHandle:
    made = SaveHandle(5, Path("/local"), 0.01)
    if second:
        made.expect_upload()
    return made


COMMITTED = Settled(step=5, slot=0, outcome="committed", bytes=1)


def test_uploaded_gives_the_url_and_the_first_end_counts() -> None:
    saved = handle()
    saved.commit(COMMITTED)
    assert saved.end_upload(Uploaded(step=5, outcome="uploaded", url="s3://bucket/run/checkpoint-5"))
    assert not saved.end_upload(Uploaded(step=5, outcome="failed", reason="later"))
    assert saved.uploaded() == "s3://bucket/run/checkpoint-5"
    assert saved.wait() == Path("/local/checkpoint-5")


def test_uploaded_says_why_there_is_none() -> None:
    with pytest.raises(CheckpointError, match=r"no second tier to go to: give attach\(tiers="):
        handle(second=False).uploaded()
    with pytest.raises(CheckpointError, match=r"step 5 is not committed after 0.01 s"):
        handle().uploaded()
    failed = handle()
    failed.end("failed", "no room")
    with pytest.raises(CheckpointError, match="step 5 was not saved"):
        failed.uploaded()
    waiting = handle()
    waiting.commit(COMMITTED)
    with pytest.raises(CheckpointError, match=r"/local/checkpoint-5 is committed, and not uploaded after 0.02 s"):
        waiting.uploaded(0.02)
    assert waiting.end_upload(Uploaded(step=5, outcome="dropped", reason="step 6 came"))
    with pytest.raises(CheckpointError, match=r"is committed, but was not uploaded \(dropped\): step 6 came"):
        waiting.uploaded()
