"""What names a place: paths as they are, URLs with their parts checked, and nothing imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Url, is_url, local_path, location_of
from tests.ranks import ROOT


@pytest.mark.parametrize("text", ["runs/llama", "/data/runs", "s3/runs", "a:b", "./s3:/x", "c:\\x"])
def test_paths_stay_paths(text: str) -> None:
    assert location_of(text) == Path(text)
    assert not is_url(text)
    assert local_path(text, "this") == Path(text)


@pytest.mark.parametrize(
    ("text", "scheme", "bucket", "key"),
    [
        ("s3://bucket/runs/llama", "s3", "bucket", "runs/llama"),
        ("s3://bucket/runs/llama/", "s3", "bucket", "runs/llama"),
        ("S3://bucket", "s3", "bucket", ""),
        ("gs://my.bucket_1/a b/ü", "gs", "my.bucket_1", "a b/ü"),
        ("az://container/x=1,y", "az", "container", "x=1,y"),
    ],
)
def test_urls_know_their_parts(text: str, scheme: str, bucket: str, key: str) -> None:
    url = location_of(text)
    assert isinstance(url, Url)
    assert (url.scheme, url.bucket, url.key) == (scheme, bucket, key)
    assert location_of(url) is url
    assert location_of(str(url)) == url
    inner = url / "checkpoint-1" / "adapter_config.json"
    assert (inner.name, inner.parent.name, inner.parent.parent) == ("adapter_config.json", "checkpoint-1", url)
    assert inner.is_relative_to(url)
    assert not url.is_relative_to(inner)
    assert not Url(f"{url}-other").is_relative_to(url)
    assert type(str(url)) is str


@pytest.mark.parametrize(
    "text",
    ["s3://", "s3:///key", "s3://b//k", "s3://bucket/a//b", "s3://bucket/../other", "s3://bucket/./a", "s3://bucket/a?b",
     "s3://bucket/a#b", "s3://bucket/a%2Fb", "s3://bucket/a\nb", "s3://bu cket/a", "s3://bucket/a\\b", "gs://-x/y"],
)  # fmt: skip
def test_what_names_no_place_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"names no bucket|the prefix has"):
        location_of(text)


@pytest.mark.parametrize("text", ["http://host/x", "file:///x", "hdfs://x/y", "s3a://bucket/x"])
def test_unknown_schemes_are_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"give a path, s3://, gs:// or az://"):
        location_of(text)


def test_what_needs_a_directory_says_so() -> None:
    with pytest.raises(CheckpointError, match=r"the export needs a directory of this host, s3://b1/x is in an object"):
        local_path("s3://b1/x", "the export")


def test_a_url_costs_no_import_until_it_is_looked_at() -> None:
    code = """
import sys
from async_ckpt.core import manifest
from async_ckpt.core.location import location_of
import async_ckpt_saver.server, async_ckpt_saver.roots
async_ckpt_saver.roots.Roots.parse("/data,s3://bucket/x")
print([name for name in ("obstore", "urllib.request", "xml.etree.ElementTree") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_without_obstore_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["obstore"] = None
import async_ckpt
try:
    async_ckpt.latest("s3://bucket/x")
except async_ckpt.CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "pip install 'async-ckpt[cloud]'" in done.stdout
