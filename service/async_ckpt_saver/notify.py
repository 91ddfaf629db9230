"""What systemd is told of a saver that it started with Type=notify: sd_notify(3), and nothing where nobody listens."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)


class Notifier:
    """Sends datagrams to the service manager's socket. Never blocks and never raises: the saver serves all the same.

    `watchdog_s`: half of the time within which systemd wants to hear of us, None if it does not watch us. Call
    `alive()` at least that often, from the loop whose hanging should be noticed.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID."""
        name = environment.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte of the abstract namespace.
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self.watchdog_s = _watchdog_s(environment) if name else None
        self._alive_s: float | None = None
        self._status = ""

    def ready(self, status: str) -> None:
        """Everything that a client may ask for is there."""
        self._status = status
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """One line for `systemctl status`; said only when it has changed."""
        if status != self._status:
            self._status = status
            self._send(f"STATUS={status}")

    def alive(self, now_s: float) -> None:
        if self.watchdog_s is None:
            return
        if self._alive_s is None or now_s - self._alive_s >= self.watchdog_s:
            self._alive_s = now_s
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=finishing the commits under way")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as speaker:
                speaker.connect(self._address)
                speaker.send(text.encode())
        except (OSError, ValueError) as error:
            log.warning("cannot tell the service manager at %r: %s", self._address, error)


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    """As sd_watchdog_enabled(3): half the interval, and only if it is meant for this process."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        interval_us = int(environment.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return interval_us / 2e6 if interval_us > 0 else None
