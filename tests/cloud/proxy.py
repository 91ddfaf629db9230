"""A TCP proxy before the store: it can stop, cut or answer for it, and counts what it did."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from types import TracebackType
from typing import Literal

Mode = Literal["pass", "cut", "busy", "full", "skewed"]
# What other stores than ours say, word for word.
_ANSWERS: dict[Mode, tuple[str, str, str]] = {
    "busy": ("503 Service Unavailable", "SlowDown", "Please reduce your request rate."),
    "full": ("507 Insufficient Storage", "XMinioStorageFull", "Storage backend has reached its minimum free drive"),
    "skewed": ("403 Forbidden", "RequestTimeTooSkewed",
               "The difference between the request time and the current time is too large."),
}  # fmt: skip


class Proxy:
    """`mode` is for connections that are made from now on; `say` also ends those that are open.

    `stop_after(n)`: when n bytes have gone to the store since, nothing goes any further and `stopped` is set, until
    `say`. `cut_after(n)`: all connections are cut then, once. `answers` and `cuts` count.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.mode: Mode = "pass"
        self.answers = self.cuts = self.sent_bytes = 0
        self.stopped = threading.Event()
        self.reached = threading.Event()
        self._limit: tuple[Literal["stop", "cut"], int] | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def say(self, mode: Mode) -> None:
        with self._lock:
            self.mode, self._limit = mode, None
        self.stopped.clear()
        self._close_all()

    def stop_after(self, count: int) -> None:
        with self._lock:
            self._limit = ("stop", self.sent_bytes + count)

    def cut_after(self, count: int) -> None:
        with self._lock:
            self._limit = ("cut", self.sent_bytes + count)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._close_all()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                mode = self.mode
            self.reached.set()
            if mode == "cut":
                self.cuts += 1
                _reset(client)
                continue
            thread = threading.Thread(target=self._serve, args=(client, mode), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, mode: Mode) -> None:
        with client:
            self._open.add(client)
            with contextlib.suppress(OSError):
                if mode in _ANSWERS:
                    self._answer(client, *_ANSWERS[mode])
                else:
                    self._forward(client)
            self._open.discard(client)

    def _answer(self, client: socket.socket, status: str, code: str, message: str) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = client.recv(65536)
            if not data:
                return
            head += data
        self.answers += 1
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        lines = [f"HTTP/1.1 {status}", "Content-Type: application/xml", "Connection: close",
                 f"Content-Length: {len(body)}", "", body]  # fmt: skip
        client.sendall("\r\n".join(lines).encode())

    def _forward(self, client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as server:
            self._open.add(server)
            while True:
                ready, _, _ = select.select([client, server], [], [])
                for source in ready:
                    data = source.recv(65536)
                    if not data or (source is client and not self._may_send(len(data))):
                        self._open.discard(server)
                        return
                    (server if source is client else client).sendall(data)

    def _may_send(self, count: int) -> bool:
        with self._lock:
            self.sent_bytes += count
            limit = self._limit
            over = limit is not None and self.sent_bytes >= limit[1]
            if over and limit is not None and limit[0] == "cut":
                self._limit = None
        if not over or limit is None:
            return True
        if limit[0] == "cut":
            self.cuts += 1
            self._close_all()
            return False
        self.stopped.set()
        while self._limit is limit:  # held until `say`
            threading.Event().wait(0.01)
        return False

    def _close_all(self) -> None:
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
