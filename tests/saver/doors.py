"""Savers that a test may let peers into."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from async_ckpt.core.keys import ClientKeys, generate, read_public, read_secret
from tests.saver.saver_process import SaverProcess

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user as well")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Doors:
    """A saver on tcp that allows one client."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        home.mkdir(parents=True, exist_ok=True)
        (home / "allow").mkdir(mode=0o700)
        self.public, self.secret = generate(home / "saver")
        allowed, mine = generate(home / "allow" / "client")
        mine.rename(home / "client.key_secret")
        self.keys = ClientKeys(read_secret(home / "client.key_secret"), read_public(self.public))
        self.options = ("--curve-secret", str(self.secret), "--curve-allow", str(home / "allow"))
        assert allowed.exists()

    def start(self) -> SaverProcess:
        return SaverProcess(self.endpoint, self.home, self.home / "log", *self.options)
