"""Where savers listen."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from .location import Location
from .slots import shm_identity


def embedded_home(directory: Location) -> Path:
    """The private directory of the embedded saver that commits into `directory` (absolute, or a URL), for this user, on
    this host, under this TMPDIR. It need not exist. Hosts that share a TMPDIR have one each: locks and sockets are no
    use between them, and a saver serves who sees its /dev/shm."""
    key = hashlib.sha256(os.fsencode(directory) + b"\0" + shm_identity().encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"async-ckpt-{os.getuid()}" / key


def embedded_endpoint(directory: Location) -> str:
    return f"ipc://{embedded_home(directory)}/saver.sock"
