"""What a saver may write to: by names, of directories and of prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt_saver.local_storage import LocalStorage
from async_ckpt_saver.roots import Roots
from async_ckpt_saver.settings import ROOT, resolve


@pytest.mark.parametrize(
    ("given", "covered"),
    [
        ("/data/runs", True), ("/data/runs/a/b", True), ("/data/runs/../runs/a", True), ("/data/runs-2", False),
        ("/data/runs/../other", False), ("data/runs", False), ("/", False), ("s3://bucket/runs", True),
        ("s3://bucket/runs/a", True), ("s3://bucket/runs-2", False), ("s3://bucket", False),
        ("s3://bucket/other", False),
        ("gs://bucket/runs", False), ("s3://bucket/runs/../other", False), ("http://bucket/runs", False), ("", False),
        ("az://container", True), ("az://container/anything", True),
    ],
)  # fmt: skip
def test_what_is_covered(given: str, covered: bool) -> None:
    roots = Roots.parse("/data/runs,s3://bucket/runs,az://container")
    assert roots.covers(given) is covered
    assert str(roots) == "/data/runs,s3://bucket/runs,az://container"
    assert roots.directories == [Path("/data/runs")]
    if not covered:
        with pytest.raises(CheckpointError, match="is outside the root"):
            roots.storage(given)


def test_each_place_has_its_storage(tmp_path: Path) -> None:
    roots = Roots.parse(f"{tmp_path}/a,{tmp_path}/b,s3://bucket/x")
    local = roots.storage(str(tmp_path / "b" / "run"))
    assert isinstance(local, LocalStorage)
    assert not local.far
    local.prepare()()
    assert list(tmp_path.iterdir()) == []
    far = roots.storage("s3://bucket/x/run")
    assert far.far
    assert far.directory == "s3://bucket/x/run"


def test_a_saver_without_a_root_is_none() -> None:
    with pytest.raises(CheckpointError, match="at least one root"):
        Roots.parse(",")


def test_a_name_may_have_commas_and_backslashes() -> None:
    """As those of a sweep have: lr=1e-4,wd=0.1."""
    strange = ["/data/lr=1,wd=2", "/data/a\\b", "/data/c,", "/data/\\,d", "s3://bucket/runs/x=1,y=2"]
    flags = resolve([ROOT], {"root": strange}, {}, {})["root"].value
    assert [str(each) for each in Roots.parse(flags).all] == strange
    from_file = resolve([ROOT], {}, {}, {"root": strange[0]}, "f")["root"].value
    assert Roots.parse(from_file).all == [Path(strange[0])]
    from_environment = resolve([ROOT], {}, {"ASYNC_CKPT_ROOT": "/a,/b\\,c"}, {})["root"].value
    assert Roots.parse(from_environment).all == [Path("/a"), Path("/b,c")]
