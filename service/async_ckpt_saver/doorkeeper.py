"""Who is let in to the socket: the list of keys that ZeroMQ asks for, and a count of those who were turned away."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import zmq

from async_ckpt.core.transport import CURVE_DOMAIN, next_failure, watch_handshakes

from .rejections import Rejections

_EVENTS_A_TURN = 100
_OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Keys(Protocol):
    """Who may connect, as pyzmq asks for it."""

    def callback(self, domain: str, key: bytes) -> bool: ...


class Doorkeeper:
    """Works in the saver's loop, on ZeroMQ's edge-triggered descriptors. Make it before the socket is bound: with a
    list nobody gets in who is not on it, not even in the first instant.

    `allowed`: a directory of public keys, read once, or whom to ask each time; None for everybody."""

    def __init__(
        self, context: zmq.Context[Any], socket: zmq.Socket[bytes], loop: asyncio.AbstractEventLoop,
        rejections: Rejections, allowed: Path | Keys | None,
    ) -> None:  # fmt: skip
        self._loop = loop
        self._rejections = rejections
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket = socket
        self._monitor = watch_handshakes(socket)
        self._authenticator = None
        self._read(self._monitor, self._drain_monitor)
        if allowed is not None:
            from zmq.auth.base import Authenticator  # only tcp needs it

            self._authenticator = Authenticator(context)
            self._authenticator.start()
            if isinstance(allowed, Path):
                self._authenticator.configure_curve(domain=CURVE_DOMAIN, location=allowed)
            else:
                self._authenticator.configure_curve_callback(CURVE_DOMAIN, credentials_provider=allowed)
            self._read(self._authenticator.zap_socket, self._drain_zap)

    def close(self) -> None:
        """Before the socket is closed."""
        self._loop.remove_reader(int(self._monitor.get(zmq.FD)))
        self._socket.disable_monitor()
        self._monitor.close(0)
        if self._authenticator is not None:
            self._loop.remove_reader(int(self._authenticator.zap_socket.get(zmq.FD)))
            self._authenticator.stop()

    def look(self) -> None:
        """Whatever the descriptors have not told."""
        self._drain_monitor()
        if self._authenticator is not None:
            self._drain_zap()

    def _read(self, socket: zmq.Socket[bytes], drain: Callable[[], None]) -> None:
        self._loop.add_reader(int(socket.get(zmq.FD)), drain)
        self._loop.call_soon(drain)

    def _drain_zap(self) -> None:
        """One question at a time: the socket is a REP."""
        authenticator = self._authenticator
        if authenticator is None or authenticator.zap_socket is None or self._tasks:
            return
        try:
            question = authenticator.zap_socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        task = self._loop.create_task(authenticator.handle_zap_message(question))
        self._tasks.add(task)
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._drain_zap()

    def _drain_monitor(self) -> None:
        for _ in range(_EVENTS_A_TURN):
            failure = None if self._monitor.closed else next_failure(self._monitor)
            if failure is None:
                return
            event, value = failure
            if event is zmq.Event.HANDSHAKE_FAILED_AUTH:
                self._rejections.count("unknown_key", "a client whose public key is not in the directory of keys")
            elif event is not zmq.Event.ACCEPT_FAILED:
                self._rejections.count("handshake", f"a peer that does not speak as agreed ({event.name}, {value})")
            elif value in _OUT_OF_FILES:
                self._rejections.count("internal", f"a connection could not be accepted: {errno.errorcode[value]}")
            else:
                self._rejections.count("foreign_user", "a process of another user at the socket")
        # Out of descriptors, libzmq says so without a pause: the rest waits for `look`, ranks are served before.
