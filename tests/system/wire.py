"""A slow wire between hosts, and one that stops where a test says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.system.hosts import NETWORKS, SIDE, SWITCH, Cluster
from tests.system.processes import until


class Proxy:
    """A TCP proxy on the switch, in front of host 1's port: it delays, and it can stop after so many bytes of a relay.

    `address` is what relays connect to.
    """

    def __init__(self, cluster: Cluster, delay_s: float = 0.0) -> None:
        self._cluster = cluster
        self._folder = cluster.folder / "proxy"
        self._folder.mkdir()
        self.host, self.port = f"{NETWORKS[SIDE]}.{SWITCH}", 5591
        self.address = f"tcp://{self.host}:{self.port}"
        self.lead_address = f"tcp://{cluster.hosts[0].address(SIDE)}:{self.port}"
        command = [sys.executable, "-IS", str(Path(__file__).with_name("proxy.py")), self.host, str(self.port),
                   cluster.hosts[0].address(SIDE), str(self.port), str(delay_s), str(self._folder)]  # fmt: skip
        self._log = self._folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(cluster.switch_command(*command), stdout=log, stderr=log)
        until(lambda: (self._folder / "up").exists() or self._process.poll() is not None, "the proxy")
        assert self._process.poll() is None, self._log.read_text()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(30)

    def hold_after(self, bytes_more: int) -> None:
        """Nothing that relays send passes any more once so many bytes have, from now on. Answers pass."""
        for name in ("held", "lost"):
            (self._folder / name).unlink(missing_ok=True)
        self._order(str(self.passed() + bytes_more))

    def until_held(self) -> None:
        until((self._folder / "held").exists, "the proxy holds what a relay sends")

    def until_lost(self) -> None:
        """The sender of what is held is gone, and its bytes with it."""
        until((self._folder / "lost").exists, "the proxy drops what a dead relay had sent")

    def let_go(self) -> None:
        self._order("")

    def passed(self) -> int:
        """Bytes from relays to the lead so far."""
        return int((self._folder / "passed").read_text() or 0)

    def _order(self, text: str) -> None:
        new = self._folder / "order.new"
        new.write_text(text)
        new.replace(self._folder / "order")
