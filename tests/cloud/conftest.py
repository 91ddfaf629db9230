"""One real S3 server for all tests here; every test has a prefix of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from async_ckpt.core.location import Url, location_of
from async_ckpt.core.objects import Objects, store_of
from tests.cloud.proxy import Proxy
from tests.cloud.weed import Weed
from tests.system.conftest import _nothing_left, folder

__all__ = ["_nothing_left", "folder"]

BUCKET = "runs"
VARIABLES = ("AWS_", "GOOGLE_", "AZURE_")


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with Weed(tmp_path_factory.mktemp("weed")) as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Without credentials of whoever runs the tests; clients made before are forgotten."""
    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)
    store_of.cache_clear()
    yield monkeypatch
    store_of.cache_clear()


@pytest.fixture
def url(weed: Weed, clean_environment: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Url:
    for name, value in weed.environment().items():
        clean_environment.setenv(name, value)
    found = location_of(f"s3://{BUCKET}/{request.node.name.split('[')[0]}-{os.urandom(3).hex()}/run")
    assert isinstance(found, Url)
    return found


@pytest.fixture
def proxied(weed: Weed, url: Url, clean_environment: pytest.MonkeyPatch) -> Iterator[tuple[Url, Proxy]]:
    """`url` through a proxy."""
    with Proxy(weed.port) as proxy:
        clean_environment.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield url, proxy


@pytest.fixture
def objects(url: Url) -> Objects:
    return Objects(url)
