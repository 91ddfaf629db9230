"""The saver's process: one endpoint, one lock, one loop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_MESSAGE_BYTES
from async_ckpt.core.protocol import FromSaver, LeadWanted, decode_from_rank, encode
from async_ckpt.core.slots import SHM, links_path
from async_ckpt.core.transport import EndpointInUse, transport_of

from .doorkeeper import Doorkeeper
from .hub import Hub
from .notify import Notifier
from .roots import Roots
from .services import Services

if TYPE_CHECKING:
    from async_ckpt.core.keys import KeyPair

    from .eyes import Eyes
    from .hosts.links import Links
    from .http_listener import Address
    from .unfinished import Unfinished

log = logging.getLogger(__name__)

_TICK_S = 1.0  # while ranks are served and nobody waits for us: each time costs half a millisecond, cold
_SHORT_TICK_S = 0.5  # also what limits how short WatchdogSec= may be: 2 s, or half of it is not told in time
# Plain numbers: combining flags costs more than sending a message.
_AT_ONCE = int(zmq.NOBLOCK)
_RCVMORE = int(zmq.RCVMORE)
_AT_ONCE_AND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_LOCK_TRIES = 20  # at 10 ms: a rank that looks whether a saver is there holds the lock for an instant
_UNUSED_S = 60.0  # an embedded saver that nobody ever registers with
_QUIET_S = 1.0  # and one that nobody needs any more


@dataclass(frozen=True)
class Config:
    """`bind`: an address (`core/transport.py`). `curve_secret`, `curve_allow`: for tcp, the file with the saver's own
    keys and the directory with the public keys of those who may connect, read once. `roots`: nothing is written outside
    them. `embedded`: exit when nobody needs this saver any more. `keep_image_s`: how long the newest image of a dead
    run is kept in RAM. `grace_s`: how long ranks that live are still served after a signal: whoever ends us may have
    ended them as well, and they have a last checkpoint to save. `lease_s`: after how long a silence a host, or a rank
    that cannot be watched, counts as gone. `direct`: every host of a job writes its part itself, where all savers of
    the job say so. `http`: where to show what goes on."""

    bind: str
    roots: Roots
    embedded: bool = False
    keep_image_s: float = 900.0
    orphan_image_s: float = 20.0
    curve_secret: Path | None = None
    curve_allow: Path | None = None
    grace_s: float = 25.0
    lease_s: float = 30.0
    direct: bool = False
    http: Address | None = None


class Server:
    """`await serve()` returns when a signal or, embedded, the end of all runs says so."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._transport = transport_of(config.bind)
        self._keys = self._read_keys() if self._transport.encrypted else None
        self._stop = asyncio.Event()
        self._eyes: Eyes | None = None
        self._links: Links | None = None
        self._signal: int | None = None
        self._signal_s = 0.0
        self._last_message_s: float | None = None
        # An embedded saver inherits the variables of a trainer that is a service itself: they are not meant for it.
        self._notifier = Notifier({} if config.embedded else os.environ)
        self._looking_again = False
        self._encoded: tuple[FromSaver | None, bytes] = (None, b"")

    async def serve(self) -> None:
        lock = self._lock()
        try:
            self._startup()
            try:
                await self._open_eyes()
                self._notifier.ready(f"serves {self._config.bind}, root {self._config.roots}")
                await self._main_loop()
            finally:
                self._notifier.stopping()
                await self._shutdown()
        finally:
            os.close(lock)
        if self._signal is not None:
            # The default action, so that whoever waits for us sees the true cause of our end.
            signal.signal(self._signal, signal.SIG_DFL)
            signal.raise_signal(self._signal)

    def _lock(self) -> int:
        """ZeroMQ lets a second process steal an ipc path without a word: the lock is what makes it ours."""
        lock = os.open(self._transport.lock_path(), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
                continue
            with contextlib.suppress(OSError):  # a full disk: it is only for people to read
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            return lock
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        raise EndpointInUse(f"{self._config.bind} belongs to another saver, pid {holder}: stop it or bind elsewhere")

    def _read_keys(self) -> KeyPair | None:
        """Checked before anything is bound, or made."""
        from async_ckpt.core.keys import read_allowed, read_secret  # only tcp needs them

        secret, allow = self._config.curve_secret, self._config.curve_allow
        if secret is None or allow is None:
            return None
        log.info("clients whose keys are allowed: %s", ", ".join(read_allowed(allow).values()))
        return read_secret(secret)

    def _with_links(self) -> Links:
        """Made when the first job on several hosts comes: most savers never have one, and it takes time and memory."""
        if self._links is None:
            from .hosts.links import Links

            self._links = Links(self._services, self._hub, self._loop, *self._link_keys())
        return self._links

    def _link_keys(self) -> tuple[KeyPair | None, set[bytes]]:
        """Those that this saver was given hold for its links as well, whatever it serves its own ranks by. A list is
        not needed: rank 0 names a key that may come in."""
        secret, allow = self._config.curve_secret, self._config.curve_allow
        if secret is None:
            return None, set()
        from async_ckpt.core.keys import read_allowed, read_secret

        return read_secret(secret), set(read_allowed(allow)) if allow is not None else set()

    def _startup(self) -> None:
        self._loop = asyncio.get_running_loop()
        for root in self._config.roots.directories:
            if root.exists() and not root.is_dir():
                raise CheckpointError(f"--root {root} is no directory")
            if not self._config.embedded and not root.exists():
                log.warning("the root %s does not exist yet: is its volume mounted?", root)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal, number)
        # Slurm sends its notice to every process of a job; it is meant for the ranks, and would end us here.
        self._loop.add_signal_handler(signal.SIGUSR1, log.info, "SIGUSR1: left to the ranks")
        self._context = zmq.Context(1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.set(zmq.LINGER, 200)
        # Without zmq's layer for options of one message, which takes a quarter of the time.
        self._send_frame = super(zmq.Socket, self._socket).send
        services = self._services = Services(
            endpoint=self._config.bind,
            root=self._config.roots,
            incarnation=secrets.token_hex(8),
            send=self._send,
            loop=self._loop,
            lease_s=self._config.lease_s,
            keep_image_s=self._config.keep_image_s,
            orphan_image_s=self._config.orphan_image_s,
            direct=self._config.direct,
            # What an embedded one leaves, only the next job of that directory takes up, and that compares the tiers.
            unfinished=None if self._config.embedded else _unfinished(self._config.bind),
        )
        self._hub = Hub(services)
        services.dial = lambda lead, events: self._with_links().dial(lead, events)
        services.hosts = lambda: [] if self._links is None else self._links.hosts()
        services.relays_of = lambda identities: {} if self._links is None else self._links.relays_of(identities)
        services.way_of = lambda identity: None if self._links is None else self._links.way_of(identity)
        allowed = self._config.curve_allow if self._keys is not None else None
        self._doorkeeper = Doorkeeper(self._context, self._socket, self._loop, services.rejections, allowed)
        try:
            self._transport.listen(self._socket, self._keys)
        except BaseException:
            self._close_socket()
            raise
        self._hub.adopt()
        if links_path(self._config.bind).exists():
            self._with_links().adopt()
        self._fd = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self._drain_socket)
        self._loop.call_soon(self._drain_socket)
        self._started_s = self._loop.time()
        log.info("saver %d serves %s, root %s", os.getpid(), self._config.bind, self._config.roots)

    async def _open_eyes(self) -> None:
        if self._config.http is None:
            return
        from .eyes import Eyes  # takes time to import, and an embedded saver has none

        self._eyes = Eyes(self._config.http, self._hub.status, self._config.roots.directories)
        self._services.on_settled = self._eyes.observe
        self._services.on_uploaded = self._eyes.observe_upload
        log.info("http://%s/ shows what goes on", await self._eyes.start())

    async def _main_loop(self) -> None:
        stop = self._loop.create_task(self._stop.wait())
        try:
            while not stop.done():
                self._hub.tick()
                self._doorkeeper.look()
                if self._links is not None:
                    self._links.tick()
                self._drain_socket()
                self._notifier.alive(self._loop.time())
                if self._config.embedded and self._unneeded():
                    log.info("nobody needs this saver any more")
                    return
                if self._signal is not None and self._may_end():
                    return
                await asyncio.wait((stop,), timeout=self._tick_s())
        finally:
            stop.cancel()

    def _tick_s(self) -> float:
        calm = self._signal is None and self._notifier.watchdog_s is None and not self._hub.quiet
        return _TICK_S if calm else _SHORT_TICK_S

    async def _shutdown(self) -> None:
        await self._hub.drain()
        if self._links is not None:
            self._links.close(for_good=self._hub.quiet)
        if self._eyes is not None:
            await self._eyes.close()
        self._loop.remove_reader(self._fd)
        self._close_socket()
        self._transport.unlisten()
        try:
            (SHM / f"async-ckpt-{os.getuid()}").rmdir()
        except OSError:
            log.debug("other runs are still in shared memory")
        log.info("saver %d ends", os.getpid())

    def _close_socket(self) -> None:
        self._doorkeeper.close()
        self._socket.close()
        self._context.term()

    def _unneeded(self) -> bool:
        now_s = self._loop.time()
        if self._last_message_s is None and now_s - self._started_s < _UNUSED_S:
            return False
        if self._links is not None and not self._links.quiet:
            return False
        return self._hub.quiet and now_s - (self._last_message_s or self._started_s) > _QUIET_S

    def _on_signal(self, number: int) -> None:
        if self._signal is not None:  # the second one does not wait for commits
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal, self._signal_s = number, self._loop.time()
        if self._eyes is not None:
            self._eyes.stopping()
        if self._may_end():
            log.info("signal %d: finishing the commits under way", number)
            self._stop.set()
        else:
            log.info("signal %d: serving the ranks that live, and uploading, for %g s at most; a second signal ends "
                     "this saver at once", number, self._config.grace_s)  # fmt: skip

    def _may_end(self) -> bool:
        needed = self._hub.serving or self._hub.uploading
        return not needed or self._loop.time() - self._signal_s >= self._config.grace_s

    def _drain_socket(self) -> None:
        """The descriptor is edge-triggered: read until there is nothing, and look again after sending."""
        self._looking_again = False
        receive = self._socket.recv
        heard = False
        while True:
            try:
                identity = receive(_AT_ONCE)
            except zmq.Again:
                break
            heard = True
            self._receive(identity, receive(_AT_ONCE))  # a ROUTER's messages have two frames or more
        if heard:
            self._last_message_s = self._loop.time()

    def _receive(self, identity: bytes, payload: bytes) -> None:
        more = self._socket.recv_multipart(_AT_ONCE) if self._socket.getsockopt(_RCVMORE) else []
        try:
            if more:
                raise ValueError("two are expected")
            message = decode_from_rank(payload)
        except (ValueError, msgspec.DecodeError) as error:
            frames = 2 + len(more)
            self._services.reject(identity, "unreadable", f"a message of {frames} frames: {error}")
            return
        try:
            if isinstance(message, LeadWanted):
                self._with_links().want(identity, message)
            else:
                self._hub.receive(identity, message)
        except Exception as error:  # one message, whatever is in it, must not end the saver for all other ranks
            name = type(message).__name__
            log.debug("a %s could not be handled", name, exc_info=True)
            self._services.reject(identity, "internal", f"a {name} could not be handled: {error!r}")

    def _send(self, identity: bytes, message: FromSaver) -> None:
        if self._links is not None and self._links.tell(identity, message):
            return
        if message is not self._encoded[0]:  # the same word goes to all ranks
            self._encoded = message, encode(message)
        try:
            self._send_frame(identity, _AT_ONCE_AND_MORE)
            self._send_frame(self._encoded[1], _AT_ONCE)
        except zmq.ZMQError as error:
            log.debug("cannot reach %r: %s", identity, error)
        # Sending may have used up the edge that tells of what came in: look again, once for all that is sent now.
        if not self._looking_again:
            self._looking_again = True
            self._loop.call_soon(self._drain_socket)


def _unfinished(endpoint: str) -> Unfinished:
    from .unfinished import Unfinished  # an embedded saver has no use for it

    return Unfinished(endpoint)
