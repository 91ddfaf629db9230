"""A run with two tiers: a real saver, a peer that stands for its one rank, a real store behind a proxy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.location import Url
from async_ckpt.core.manifest import committed, read_manifest
from async_ckpt.core.objects import Objects
from async_ckpt.core.protocol import (
    Ack,
    Bye,
    Claim,
    FromSaver,
    Granted,
    ImageFile,
    Layout,
    Options,
    Ping,
    Ready,
    Refused,
    Register,
    Settled,
    Staged,
    Started,
    Uploaded,
    decode_from_saver,
)
from async_ckpt.core.region import Region
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import SlotPaths
from tests.cloud.proxy import Proxy
from tests.cloud.weed import Weed
from tests.saver.hub_bench import stage
from tests.saver.saver_process import Peer, SaverProcess, register, until

FILE = plan_file("adapter_model.safetensors", [TensorSpec("w", "F32", (6 << 20,))])  # 24 MiB: four parts
LAYOUT = Layout((ImageFile(FILE.path, FILE.header, FILE.total_bytes),), {"README.md": b"read me"})
MANIFEST = "async_ckpt.json"


class Tiered:
    """`local` and `url` are the tiers. Everything that is heard is kept; every save goes into slot 0."""

    def __init__(self, folder: Path, url: Url, proxy: Proxy, weed: Weed) -> None:
        self.folder, self.url, self.proxy = folder, url, proxy
        self.local = folder / "local"
        self.log = folder / "log"
        self.endpoint = f"ipc://{folder}/s"
        self.heard: list[FromSaver] = []
        self._environment = weed.environment(proxy.endpoint)
        self._sequence = 0

    def saver(self, *options: str) -> SaverProcess:
        """It serves; whoever calls ends it."""
        more = ("--root", str(self.url.parent), *options)
        return SaverProcess(self.endpoint, self.folder, self.log, *more, env=self._environment).up()

    def start(self, peer: Peer, *, job: str = "job", policy: Policy | None = None, timeout_s: float = 60.0) -> Started:
        self.peer = peer
        peer.say(self._register(job, policy or Policy(), timeout_s))
        self.granted = peer.hear(Granted)
        peer.say(Ready())
        return peer.hear(Started)

    def refused(self, peer: Peer) -> str:
        peer.say(self._register("job", Policy(), 60.0))
        return peer.hear(Refused).reason

    def _register(self, job: str, policy: Policy, timeout_s: float) -> Register:
        claims = pack_claims([FILE], [Claim(0, 0, Region(False, (0,), (6 << 20,)))])[0]
        options = Options(str(self.local), 1, 2, policy, timeout_s, upload_to=str(self.url))
        return register(self.local, options=options, layout=LAYOUT, claims=claims, job=job)

    def commit(self, step: int) -> Settled:
        """Save other bytes than before."""
        path = SlotPaths(Path(self.granted.run), 0).image / FILE.path
        with path.open("r+b") as file:
            file.seek(len(FILE.header))
            file.write(os.urandom(FILE.total_bytes - len(FILE.header)))
        stage(self.granted, 0, 0, step)
        self._sequence += 1
        self.peer.say(Staged(seq=self._sequence, slot=0, step=step, copy_s=0.1))
        return self.settled(step)

    def settled(self, step: int) -> Settled:
        return self._await(Settled, step, Ping(unsettled=[step]))

    def uploaded(self, step: int) -> Uploaded:
        return self._await(Uploaded, step, Ping(unsettled=[], not_uploaded=[step]))

    def open_uploads(self, steps: list[int]) -> list[int]:
        """Those of which the saver has nothing to tell."""
        return [step for step in steps if self._find(Uploaded, step) is None]

    def leave(self) -> None:
        self._sequence += 1
        self.peer.say(Bye(seq=self._sequence))
        self.peer.hear(Ack)

    def here(self) -> list[int]:
        return [step for step, _ in committed(self.local)]

    def there(self) -> list[int]:
        return [step for step, _ in committed(str(self.url))]

    def lose_local(self) -> None:
        shutil.rmtree(self.local)

    def assert_alike(self, step: int) -> None:
        """Every file of the checkpoint, the manifest too, is byte for byte the same in both tiers."""
        name, objects = f"checkpoint-{step}", Objects(self.url)
        there = objects.walk((self.url / name).key)
        here = {str(file.relative_to(self.local / name)) for file in (self.local / name).rglob("*") if file.is_file()}
        assert there.keys() == here == {*read_manifest(self.local / name).files, MANIFEST}
        assert len(here) == 3
        for path in here:
            assert objects.read((self.url / name / path).key) == (self.local / name / path).read_bytes(), path

    def _await(self, kind: type[Any], step: int, ask: Ping) -> Any:
        def found() -> Any:
            self.peer.say(ask)
            while self.peer.socket.poll(50):
                self.heard.append(decode_from_saver(self.peer.socket.recv()))
            return self._find(kind, step)

        until(found, f"{kind.__name__} of step {step}: {self.log.read_text()[-3000:]}", 60.0)
        return self._find(kind, step)

    def _find(self, kind: type[Any], step: int) -> Any:
        return next((each for each in self.heard if isinstance(each, kind) and each.step == step), None)
