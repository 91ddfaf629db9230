"""The way between two hosts, as a tcp proxy that can be held and cut."""

from __future__ import annotations

import selectors
import socket
import threading


class Wire:
    """A tcp proxy to `endpoint`: what goes up can be held after so many bytes, and all of it can be cut."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._door = socket.create_server(("127.0.0.2", 0))
        self.endpoint = f"tcp://127.0.0.2:{self._door.getsockname()[1]}"
        self._wake, self._waked = socket.socketpair()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._up: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.passed_bytes = 0
        self._limit_bytes: int | None = None
        self._cut = self._closed = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def hold(self, after_bytes: int = 0) -> None:
        """Let no more than so many bytes go up."""
        with self._lock:
            self._limit_bytes = self.passed_bytes + after_bytes
        self._wake.send(b"x")

    def let_go(self) -> None:
        with self._lock:
            self._limit_bytes, self._cut = None, False
        self._wake.send(b"x")

    def cut(self) -> None:
        """Every connection ends, and none is made."""
        with self._lock:
            self._cut = True
        self._wake.send(b"x")

    @property
    def held(self) -> bool:
        with self._lock:
            return self._limit_bytes is not None and self.passed_bytes >= self._limit_bytes

    def close(self) -> None:
        self._closed = True
        self._wake.send(b"x")
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed:
                self._turn()
        finally:
            for each in [*self._pairs, self._door, self._wake, self._waked]:
                each.close()

    def _turn(self) -> None:
        with self._lock:
            cut = self._cut
            room = None if self._limit_bytes is None else max(0, self._limit_bytes - self.passed_bytes)
        if cut:
            for each in self._pairs:
                each.close()
            self._pairs, self._up = {}, set()
        with selectors.DefaultSelector() as selector:
            selector.register(self._waked, selectors.EVENT_READ)
            selector.register(self._door, selectors.EVENT_READ)
            for each in self._pairs:
                if room != 0 or each not in self._up:
                    selector.register(each, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select()]
        for each in ready:
            assert isinstance(each, socket.socket)
            if each is self._waked:
                each.recv(4096)
            elif each is self._door:
                self._accept(cut)
            elif each in self._pairs:
                self._pass(each, room)

    def _accept(self, cut: bool) -> None:
        near, _ = self._door.accept()
        try:
            far = None if cut else socket.create_connection(self._target, 5)
        except OSError:
            far = None
        if far is None:
            near.close()
            return
        self._pairs[near], self._pairs[far] = far, near
        self._up.add(near)

    def _pass(self, source: socket.socket, room: int | None) -> None:
        size = 65_536 if room is None or source not in self._up else min(room, 65_536)
        try:
            data = source.recv(size)
            self._pairs[source].sendall(data)
        except OSError:
            data = b""
        if source in self._up:
            with self._lock:
                self.passed_bytes += len(data)
        if not data:
            other = self._pairs.pop(source)
            self._pairs.pop(other, None)
            for each in (source, other):
                self._up.discard(each)
                each.close()
