"""Where a lead listens for relays: one ROUTER, with CURVE and a list of keys, or plain where it was asked for."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
from collections.abc import Callable, Sequence

import msgspec
import zmq

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.keys import KeyPair
from async_ckpt.core.limits import MAX_MESSAGE_BYTES
from async_ckpt.core.transport import CURVE_DOMAIN

from ..doorkeeper import Doorkeeper
from ..memory import reuse_large_blocks
from ..rejections import Rejections
from .lane import Payload

log = logging.getLogger(__name__)

IO_THREADS = 2
_AT_A_TURN = 16  # words, or one piece: then relays hear what has come, and ranks of this host are served
_HEARTBEAT_MS = 2000
_SILENT_MS = 10_000


class KeyRing:
    """Who may connect: asked by ZeroMQ for each connection."""

    def __init__(self, allowed: set[bytes]) -> None:
        self.allowed = allowed

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self.allowed


class LinkRecord(msgspec.Struct, frozen=True):
    """A listener as a later saver opens it again: on the same port, with the same keys. No keys: plain."""

    asked: str
    endpoint: str
    public: bytes
    secret: bytes
    allowed: list[bytes]


class Listener:
    """`on_frames(routing, word, payload)` gets each message, `on_turn` is called after a few of them."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        rejections: Rejections,
        on_frames: Callable[[bytes, bytes | memoryview, Sequence[memoryview]], None],
        on_turn: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._rejections = rejections
        self._on_frames = on_frames
        self._on_turn = on_turn
        self._again = False
        self.endpoint = ""

    def open(self, address: str, keys: KeyPair | None, ring: KeyRing) -> str:
        """Bind to "IP:PORT", port 0 for any; returns the endpoint. Raises CheckpointError."""
        version = _ip_version(address)
        reuse_large_blocks()
        self._context = zmq.Context(IO_THREADS)
        socket = self._socket = self._context.socket(zmq.ROUTER)
        socket.set(zmq.ROUTER_HANDOVER, 1)
        socket.set(zmq.RCVHWM, 0)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.set(zmq.LINGER, 200)
        socket.set(zmq.IPV6, version == 6)
        socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, _SILENT_MS)
        if keys is not None:
            socket.set(zmq.CURVE_SERVER, 1)
            socket.set(zmq.CURVE_PUBLICKEY, keys.public)
            socket.set(zmq.CURVE_SECRETKEY, keys.secret)
            socket.set_string(zmq.ZAP_DOMAIN, CURVE_DOMAIN)
        self._doorkeeper = Doorkeeper(
            self._context, socket, self._loop, self._rejections, ring if keys is not None else None
        )
        try:
            port = address.rpartition(":")[2]
            socket.bind(f"tcp://{address[: -len(port)]}{'*' if port == '0' else port}")
        except zmq.ZMQError as error:
            self._doorkeeper.close()
            self._context.destroy(0)
            hint = ""
            if error.errno == errno.EADDRNOTAVAIL:
                hint = ": it is no address of this host; set ASYNC_CKPT_LEAD=tcp://IP:PORT to one that the others reach"
            raise CheckpointError(f"cannot listen for the savers of other hosts on {address}: {error}{hint}") from error
        self.endpoint = socket.get_string(zmq.LAST_ENDPOINT)
        self._fd = int(socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._loop.call_soon(self._drain)
        return self.endpoint

    def send(self, routing: bytes, word: bytes, payload: Payload | None) -> None:
        with contextlib.suppress(zmq.ZMQError):
            parts = [routing, word] if payload is None else [routing, word, payload]
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        self._look_again()

    def look(self) -> None:
        """Whatever the descriptors have not told."""
        self._doorkeeper.look()
        self._look_again()

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._doorkeeper.close()
        self._socket.close()
        self._context.term()

    def _look_again(self) -> None:
        if not self._again:
            self._again = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """The descriptor is edge-triggered: read until there is nothing, or look again soon."""
        self._again = False
        if self._socket.closed:
            return
        for _ in range(_AT_A_TURN):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            if len(frames) < 2:
                self._rejections.count("unreadable", f"a message of {len(frames)} frames on a link")
                continue
            self._on_frames(frames[0].bytes, frames[1].buffer, [frame.buffer for frame in frames[2:]])
            if len(frames) > 2:
                self._look_again()
                break
        else:
            self._look_again()
        self._on_turn()


def _ip_version(address: str) -> int:
    """Raises CheckpointError unless it is "IP:PORT" or "[IP]:PORT"."""
    host, _, port = address.rpartition(":")
    try:
        if not port.isascii() or not port.isdigit() or int(port) > 65_535:
            raise ValueError("no port")
        version = ipaddress.ip_address(host[1:-1] if host.startswith("[") else host).version
        if (version == 6) != host.startswith("["):
            raise ValueError("brackets")
    except ValueError as error:
        raise CheckpointError(
            f"{address!r} cannot be listened on: give the IP address of an interface of this host and a port, as in "
            f"10.0.0.1:0 or [fd00::1]:40001"
        ) from error
    return version
