"""Where a saver is reached, and how a socket of either side gets there: the scheme of the address says which transport.

    ipc:///run/async-ckpt/saver.sock     one user's processes: a private directory, and the kernel's word on the peer
    tcp://127.0.0.1:5591                 whoever has a key that the saver lists, on every address alike

Ranks and saver share /dev/shm whatever the transport; only their messages take it.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import os
import stat
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import zmq

from .errors import CheckpointError
from .private import private_directory

if TYPE_CHECKING:
    from .keys import ClientKeys, KeyPair  # only tcp needs it, and it takes time to import

SECRET_VARIABLE = "ASYNC_CKPT_CURVE_SECRET"  # the file with one's own pair, of a rank and of a saver
SERVER_VARIABLE = "ASYNC_CKPT_CURVE_SERVER"  # the file with the saver's public key, of a rank
ALLOW_VARIABLE = "ASYNC_CKPT_CURVE_ALLOW"  # the directory with the public keys of the ranks, of a saver
CURVE_DOMAIN = "async-ckpt"
HANDSHAKE_MS = 10_000  # for what accepts and then says nothing; ZeroMQ would wait 30 s, as long as a lease
_MAX_SOCKET_PATH_BYTES = 100  # sun_path has 108
_EVENT = struct.Struct("=HI")  # zmq_socket_monitor(3); pyzmq's own parser brings its asyncio with it

Socket: TypeAlias = "zmq.Socket[bytes]"


class EndpointInUse(CheckpointError):
    """Another saver holds this endpoint."""


class Transport(Protocol):
    """`encrypted`: peers prove who they are by keys; else the kernel says it."""

    endpoint: str
    encrypted: bool

    def lock_path(self) -> Path:
        """The file whose flock makes a saver the only one on this endpoint; its directory is there, and private.
        Raises CheckpointError."""

    def listen(self, socket: Socket, own: KeyPair | None) -> None:
        """Bind, so that only who may be let in is. Raises CheckpointError, EndpointInUse."""

    def connect(self, socket: Socket, keys: ClientKeys | None) -> None:
        """Raises CheckpointError if what listens there cannot be trusted, as far as can be told now."""

    def check_saver(self) -> None:
        """Raises CheckpointError unless only this user can listen there; before anything is told to a saver."""

    def unlisten(self) -> None:
        """After the socket was closed: leave nothing behind."""


def transport_of(endpoint: str) -> Transport:
    """Raises CheckpointError if `endpoint` is no address of a saver."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        return Ipc(endpoint, rest)
    if scheme == "tcp":
        return Tcp(endpoint, rest)
    raise CheckpointError(
        f"{endpoint!r} is no address of a saver: give ipc:// and an absolute path, as in "
        f"ipc:///run/async-ckpt/saver.sock, or tcp://HOST:PORT"
    )


class Ipc:
    """A socket in a directory that only this user can enter; ZeroMQ asks the kernel for the peer's uid as well, in
    case the directory was opened up later."""

    encrypted = False

    def __init__(self, endpoint: str, name: str) -> None:
        self.endpoint = endpoint
        if not name.startswith("/") or "\0" in name:
            raise CheckpointError(f"{endpoint!r}: give ipc:// and an absolute path, as in ipc:///run/saver.sock")
        if len(os.fsencode(name)) > _MAX_SOCKET_PATH_BYTES:
            raise CheckpointError(f"{name} is too long for a Unix socket ({len(os.fsencode(name))} bytes, at most "
                                  f"{_MAX_SOCKET_PATH_BYTES})")  # fmt: skip
        self.path = Path(name)

    def lock_path(self) -> Path:
        private_directory(self.path.parent)
        return self.path.with_name(self.path.name + ".lock")

    def listen(self, socket: Socket, own: KeyPair | None) -> None:
        try:
            socket.set(zmq.IPC_FILTER_UID, os.geteuid())
        except zmq.ZMQError as error:
            raise CheckpointError(f"this libzmq ({zmq.zmq_version()}) cannot check who connects ({error}): install "
                                  f"pyzmq's own wheel") from error  # fmt: skip
        umask = os.umask(0o177)  # before any thread runs, since the umask is shared
        try:
            socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            raise CheckpointError(f"cannot bind {self.endpoint}: {error}") from error
        finally:
            os.umask(umask)

    def connect(self, socket: Socket, keys: ClientKeys | None) -> None:
        if self.path.parent.exists():
            self.check_saver()
        socket.connect(self.endpoint)

    def check_saver(self) -> None:
        """Whoever can make files in the directory could listen there, and have our weights written where it likes."""
        try:
            info = self.path.parent.lstat()
        except OSError as error:
            raise CheckpointError(f"cannot look at {self.path.parent}: {error.strerror or error}") from error
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise CheckpointError(
                f"{self.path.parent}, where the saver's socket should be, is of uid {info.st_uid} and mode "
                f"{stat.filemode(info.st_mode)}; it must be a directory of uid {os.geteuid()} with mode 0700: run "
                f"ranks and saver as the same user"
            )

    def unlisten(self) -> None:
        self.path.unlink(missing_ok=True)


class Tcp:
    """CURVE, on the loopback interface too: every user of a machine can reach that."""

    encrypted = True

    def __init__(self, endpoint: str, address: str) -> None:
        self.endpoint = endpoint
        self.host, _, port = address.rpartition(":")
        if not self.host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65_535:
            raise CheckpointError(f"{endpoint!r}: give tcp://HOST:PORT, as in tcp://127.0.0.1:5591")

    def lock_path(self) -> Path:
        """Below the temporary directory, as all that this user's savers of one host share besides /dev/shm."""
        home = private_directory(Path(tempfile.gettempdir()) / f"async-ckpt-{os.getuid()}")
        return home / f"tcp-{hashlib.sha256(self.endpoint.encode()).hexdigest()[:12]}.lock"

    def listen(self, socket: Socket, own: KeyPair | None) -> None:
        if own is None:
            raise CheckpointError(
                f"{self.endpoint}: tcp is served with CURVE keys only, since every user of a machine can connect: "
                f"`async-ckpt-saver keygen` makes some, then give --curve-secret and --curve-allow; or bind ipc://"
            )
        try:
            version = ipaddress.ip_address(self.host.strip("[]")).version
        except ValueError as error:
            raise CheckpointError(f"cannot bind {self.endpoint}: give the IP address of an interface") from error
        socket.set(zmq.IPV6, version == 6)
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_PUBLICKEY, own.public)
        socket.set(zmq.CURVE_SECRETKEY, own.secret)
        socket.set_string(zmq.ZAP_DOMAIN, CURVE_DOMAIN)
        try:
            socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            in_use = error.errno == errno.EADDRINUSE
            kind = EndpointInUse if in_use else CheckpointError
            raise kind(f"cannot bind {self.endpoint}: {error}") from error

    def connect(self, socket: Socket, keys: ClientKeys | None) -> None:
        if keys is None:
            raise CheckpointError(
                f"{self.endpoint}: tcp needs CURVE keys: set {SECRET_VARIABLE} to your .key_secret file and "
                f"{SERVER_VARIABLE} to the saver's .key file"
            )
        socket.set(zmq.IPV6, self.host.startswith("["))
        socket.set(zmq.CURVE_SERVERKEY, keys.server)
        socket.set(zmq.CURVE_PUBLICKEY, keys.own.public)
        socket.set(zmq.CURVE_SECRETKEY, keys.own.secret)
        socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            raise CheckpointError(f"cannot connect to {self.endpoint}: {error}") from error

    def check_saver(self) -> None:
        """The handshake has done it: only who has the saver's secret key could answer."""

    def unlisten(self) -> None:
        """The kernel closes the port."""


def watch_handshakes(socket: Socket) -> Socket:
    """A socket that yields an event for each peer that does not get in; ZeroMQ itself drops it without a word."""
    events = (zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
              | zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.ACCEPT_FAILED)  # fmt: skip
    return socket.get_monitor_socket(events)


def next_failure(monitor: Socket) -> tuple[zmq.Event, int] | None:
    """The next such event and its value, None if there is none now."""
    try:
        event, _ = monitor.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
    number, value = _EVENT.unpack(event)
    return zmq.Event(number), value


class Door:
    """A rank's view of its own way in over tcp. Make it before the socket connects."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self.monitor = watch_handshakes(socket)
        self.hint = ""  # what may be wrong, for an error about a saver that does not answer

    def look(self) -> str | None:
        """Why the saver will never let us in, None as long as it may."""
        while (failure := next_failure(self.monitor)) is not None:
            if failure[0] is zmq.Event.HANDSHAKE_FAILED_AUTH:
                return (f"the saver does not allow this key: put the public key that belongs to ${SECRET_VARIABLE} "
                        f"into the saver's --curve-allow directory and start the saver again")  # fmt: skip
            self.hint = (f", but somebody is there who does not know the key in ${SERVER_VARIABLE} or speaks without "
                         f"keys")  # fmt: skip
        return None

    def close(self) -> None:
        """Before the socket is closed."""
        self._socket.disable_monitor()
        self.monitor.close(0)
