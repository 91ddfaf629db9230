"""The same against Azurite, Microsoft's own emulator of Azure Blob Storage (`npm i -g azurite`); skipped without it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from async_ckpt.core.attempts import Attempts
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Url
from async_ckpt.core.manifest import committed, latest
from async_ckpt.core.objects import Objects, store_of
from async_ckpt.core.retention_policy import Policy
from async_ckpt_saver.object_collection import collect_objects, remove_step
from async_ckpt_saver.object_examination import examine_store
from async_ckpt_saver.object_storage import ObjectStorage
from async_ckpt_saver.reservation import Reservations
from async_ckpt_saver.writer import AlreadyCommittedError
from tests.cloud.test_object_storage import put
from tests.cloud.weed import free_ports
from tests.saver.committing import ADAPTER, make_image

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("azurite-blob") is None, reason="needs azurite: npm i -g azurite"),
]

_ACCOUNT = "devstoreaccount1"  # Azurite's own, and its key; both are published
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture
def az(folder: Path, clean_environment: pytest.MonkeyPatch) -> Iterator[Url]:
    (port,) = free_ports(1)
    command = ["azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder),
               "--skipApiVersionCheck", "--disableTelemetry", "--silent"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            _wait_for(port)
            endpoint = f"http://127.0.0.1:{port}/{_ACCOUNT}"
            _make_container(endpoint, "runs")
            for name, value in (("ACCOUNT_NAME", _ACCOUNT), ("ACCOUNT_KEY", _KEY), ("ENDPOINT", endpoint)):
                clean_environment.setenv(f"AZURE_STORAGE_{name}", value)
            clean_environment.setenv("AZURE_ALLOW_HTTP", "true")
            yield Url("az://runs/team/run")
        finally:
            server.kill()


def _wait_for(port: int) -> None:
    deadline_s = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def _make_container(endpoint: str, name: str) -> None:
    """obstore signs no requests without a key of an object."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    text = (
        f"PUT{chr(10) * 12}x-ms-date:{date}\nx-ms-version:{version}\n/{_ACCOUNT}/{_ACCOUNT}/{name}\nrestype:container"
    )
    digest = hmac.new(base64.b64decode(_KEY), text.encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": version,
        "Authorization": f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}",
    }
    with urlopen(Request(f"{endpoint}/{name}?restype=container", method="PUT", headers=headers)) as answer:
        assert answer.status == 201


def test_azure(az: Url, folder: Path, clean_environment: pytest.MonkeyPatch) -> None:
    image = make_image(folder / "image", adapter_bytes=(17 << 20) + 4097)
    assert [each.verdict for each in examine_store(az)] == ["ok"] * 4
    for step in (1, 2, 3):
        assert put(az, step, image) == f"{az}/checkpoint-{step}"
    assert Objects(az).read((az / "checkpoint-2" / ADAPTER).key) == (image / ADAPTER).read_bytes()
    assert [step for step, _ in committed(az)] == [1, 2, 3]
    with pytest.raises(AlreadyCommittedError, match="exists already"):
        put(az, 3, image, run="another")
    for fresh in (True, False):  # made, and taken over
        assert Reservations(Objects(az), az).take(4, "run-1", "commit", 60.0, Attempts(10.0)).fresh is fresh
    assert put(az, 4, image) == f"{az}/checkpoint-4"
    remove_step(Objects(az), az, 4, Attempts(10.0))
    ObjectStorage(az).retain(Policy(keep_last=2))
    assert [each.name for each in collect_objects(az, Policy(keep_last=1), dry_run=False)] == ["checkpoint-2"]
    assert {path.partition("/")[0] for path in Objects(az).walk(az.key)} == {"checkpoint-3"}
    with pytest.raises(CheckpointError, match="there is no such bucket"):
        latest("az://nowhere/run")
    clean_environment.setenv("AZURE_STORAGE_ACCOUNT_KEY", "AAAA")
    store_of.cache_clear()
    with pytest.raises(CheckpointError, match="the credentials are not accepted"):
        latest(str(az))
