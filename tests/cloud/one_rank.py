"""A run of one rank without torch: an adapter of four parts, staged by whoever calls."""

from __future__ import annotations

import os
from pathlib import Path

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.location import Url
from async_ckpt.core.protocol import Claim, Granted, ImageFile, Layout, Options
from async_ckpt.core.region import Region
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import SlotPaths
from tests.saver.hub_bench import stage
from tests.saver.saver_process import Peer

FILE = plan_file("adapter_model.safetensors", [TensorSpec("w", "F32", (6 << 20,))])  # 24 MiB: four parts
LAYOUT = Layout((ImageFile(FILE.path, FILE.header, FILE.total_bytes),), {"README.md": b"read me"})


def start(peer: Peer, url: Url) -> Granted:
    claims = pack_claims([FILE], [Claim(0, 0, Region(False, (0,), (6 << 20,)))])[0]
    options = Options(str(url), 1, 2, Policy(), 60.0)
    return peer.start(Path("/unused"), options=options, layout=LAYOUT, claims=claims)


def fill(granted: Granted, step: int) -> bytes:
    """Stage `step` in slot 0; what its adapter is then."""
    path = SlotPaths(Path(granted.run), 0).image / FILE.path
    with path.open("r+b") as file:
        file.seek(len(FILE.header))
        file.write(os.urandom(FILE.total_bytes - len(FILE.header)))
    stage(granted, 0, 0, step)
    return path.read_bytes()
