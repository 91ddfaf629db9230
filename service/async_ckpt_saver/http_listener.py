"""A listener for eyes, not for hands: GET only, nothing that is asked for changes anything."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from async_ckpt.core.errors import CheckpointError

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 8 << 10
MAX_CONNECTIONS = 64
_REQUEST_S = 5.0
_SEND_S = 10.0  # a reader that takes nothing for so long is dropped
_CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", _CONTENT_SECURITY),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("Connection", "close"),
)


@dataclass(frozen=True)
class Answer:
    """`body`: the whole of it, or what is sent piece by piece until the reader leaves."""

    body: bytes | AsyncIterator[bytes]
    kind: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK


Route = Callable[[], Awaitable[Answer]]


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback


def parse_address(text: str) -> Address:
    """ "PORT", "HOST:PORT" or "[IPv6]:PORT"; without a host it is 127.0.0.1. Port 0 takes any free one.

    Raises CheckpointError for a name other than localhost: what a name stands for may change, an address does not.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    problem = None if port.isascii() and port.isdigit() and int(port) < 1 << 16 else "the port is a number below 65536"
    if problem is None and host != "localhost":
        try:
            ipaddress.ip_address(host)
        except ValueError:
            problem = "the host is an IP address or localhost"
    if problem is not None:
        raise CheckpointError(f"cannot listen on {text!r}: {problem}; give PORT or HOST:PORT, as in 127.0.0.1:9471")
    return Address(host, int(port))


class HttpListener:
    """Answers `routes` (path to what makes the answer) and nothing else. A broken or slow reader costs one task for at
    most some seconds, and the saver's loop never waits for it."""

    def __init__(self, address: Address, routes: Mapping[str, Route]) -> None:
        self._address = address
        self._routes = routes
        self._readers: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def readers(self) -> int:
        return len(self._readers)

    async def start(self) -> Address:
        """Returns where it listens. Raises CheckpointError if the port is taken."""
        try:
            self._server = await asyncio.start_server(
                self._connected, self._address.host, self._address.port, limit=MAX_REQUEST_BYTES
            )
        except OSError as error:
            raise CheckpointError(f"cannot listen on {self._address}: {error.strerror or error}: "
                                  f"choose another port with --http") from error  # fmt: skip
        host, port = self._server.sockets[0].getsockname()[:2]
        return Address(host, port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._readers.add(task)
        try:
            if len(self._readers) > MAX_CONNECTIONS:
                answer, head = _plain(HTTPStatus.SERVICE_UNAVAILABLE, "too many readers"), False
            else:
                answer, head = await self._answer(reader)
            await _send(writer, answer, head)
        except (OSError, asyncio.TimeoutError, asyncio.CancelledError):
            pass  # the reader has left, or we do
        except Exception:  # a fault in what is shown must not end what it shows
            log.exception("a request could not be answered")
        finally:
            self._readers.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[Answer, bool]:
        """What to send, and whether only its head is wanted."""
        try:
            request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _REQUEST_S)
        except asyncio.LimitOverrunError:
            return _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"at most {MAX_REQUEST_BYTES} bytes"), False
        except asyncio.IncompleteReadError:
            return _plain(HTTPStatus.BAD_REQUEST, "the request is not whole"), False
        first, *lines = request.decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _plain(HTTPStatus.BAD_REQUEST, "not an HTTP/1 request"), False
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, "only GET"), False
        if not self._may_ask(lines):
            return _plain(HTTPStatus.FORBIDDEN, "ask for it by its address or as localhost"), False
        route = self._routes.get(target.partition("?")[0])
        if route is None:
            return _plain(HTTPStatus.NOT_FOUND, f"there is {', '.join(sorted(self._routes))}"), False
        return await route(), method == "HEAD"

    def _may_ask(self, lines: list[str]) -> bool:
        """Whether a loopback listener was asked for by address. A page from elsewhere whose name was made to point to
        127.0.0.1 (DNS rebinding) asks for it by that name."""
        if not self._address.loopback:
            return True
        hosts = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("host:")]
        if len(hosts) != 1:
            return not hosts
        with contextlib.suppress(CheckpointError):
            text = hosts[0]
            return parse_address(text if text.rpartition(":")[2].isdigit() else f"{text}:80").loopback
        return False


def _plain(status: HTTPStatus, text: str) -> Answer:
    return Answer(f"{text}\n".encode(), status=status)


async def _send(writer: asyncio.StreamWriter, answer: Answer, head: bool) -> None:
    lines = [f"HTTP/1.1 {answer.status.value} {answer.status.phrase}", f"Content-Type: {answer.kind}"]
    lines += [f"{name}: {value}" for name, value in _HEADERS]
    if answer.status is HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET, HEAD")
    if isinstance(answer.body, bytes):
        lines.append(f"Content-Length: {len(answer.body)}")
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    if not head:
        if isinstance(answer.body, bytes):
            writer.write(answer.body)
        else:
            async for piece in answer.body:
                writer.write(piece)
                await asyncio.wait_for(writer.drain(), _SEND_S)
    await asyncio.wait_for(writer.drain(), _SEND_S)
