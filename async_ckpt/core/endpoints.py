"""Where savers listen."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from .location import Location


def embedded_home(directory: Location) -> Path:
    """The private directory of the embedded saver that commits into `directory` (absolute, or a URL), for this user, on
    this host, under this TMPDIR. It need not exist."""
    key = hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"async-ckpt-{os.getuid()}" / key


def embedded_endpoint(directory: Location) -> str:
    return f"ipc://{embedded_home(directory)}/saver.sock"
