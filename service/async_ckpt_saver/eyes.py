"""What the HTTP listener shows: the page, the status it is made of, metrics and probes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from importlib import resources
from pathlib import Path

from .http_listener import Address, Answer, HttpListener, Route
from .metrics import CONTENT_TYPE, Metrics
from .status import SaverStatus, SaveStatus, encode_status
from .upload_status import UploadedStep

_REPEAT_S = 2.0
_PROBE_S = 2.0
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


class Eyes:
    """Tell it of each save that settles; everything else is looked up when somebody asks."""

    def __init__(self, address: Address, status: Callable[[], SaverStatus], roots: list[Path]) -> None:
        self._status = status
        self._roots = roots
        self._metrics = Metrics(status)
        self._changed = asyncio.Event()
        self._stopping = False
        self._probe: asyncio.Future[str | None] | None = None
        routes: dict[str, Route] = {
            "/metrics": self._answer_metrics,
            "/livez": self._live,
            "/readyz": self._ready,
            "/status.json": self._answer_status,
            "/events": self._events,
        }
        for path, (name, kind) in _PAGE.items():
            routes[path] = _fixed((resources.files(__package__) / "page" / name).read_bytes(), kind)
        self._listener = HttpListener(address, routes)

    async def start(self) -> Address:
        """Raises CheckpointError if the port is taken."""
        return await self._listener.start()

    def stopping(self) -> None:
        """From now on the saver is not ready for new jobs."""
        self._stopping = True

    async def close(self) -> None:
        await self._listener.close()

    def observe(self, save: SaveStatus) -> None:
        self._metrics.observe(save)
        self._changed.set()
        self._changed = asyncio.Event()

    def observe_upload(self, upload: UploadedStep) -> None:
        self._metrics.observe_upload(upload)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _answer_metrics(self) -> Answer:
        return Answer(self._metrics.exposition(), CONTENT_TYPE)

    async def _answer_status(self) -> Answer:
        return Answer(encode_status(self._status()), "application/json")

    async def _live(self) -> Answer:
        """That it is answered is the answer: the loop that serves the ranks runs."""
        return Answer(b"ok\n")

    async def _ready(self) -> Answer:
        reason = "the saver is stopping" if self._stopping else await self._storage()
        if reason is None:
            return Answer(b"ok\n")
        return Answer(f"{reason}\n".encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)

    async def _storage(self) -> str | None:
        """Why nothing could be committed now. One look at a time: on a dead network filesystem it may take for ever."""
        if self._probe is None:
            self._probe = asyncio.ensure_future(asyncio.to_thread(_unusable, self._roots))
        try:
            reason = await asyncio.wait_for(asyncio.shield(self._probe), _PROBE_S)
        except asyncio.TimeoutError:
            return f"the root {', '.join(map(str, self._roots))} does not answer within {_PROBE_S:g} s"
        self._probe = None
        return reason

    async def _events(self) -> Answer:
        return Answer(self._snapshots(), "text/event-stream")

    async def _snapshots(self) -> AsyncIterator[bytes]:
        """Server-sent events: the status at once, after each save, and every two seconds."""
        while True:
            changed = self._changed
            yield b"data: " + encode_status(self._status()) + b"\n\n"
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), _REPEAT_S)


def _fixed(body: bytes, kind: str) -> Route:
    async def answer() -> Answer:
        return Answer(body, kind)

    return answer


def _unusable(roots: list[Path]) -> str | None:
    """Why nothing could be committed below one of `roots`."""
    for root in roots:
        if not root.is_dir():
            return f"the root {root} is not there: is its volume mounted?"
        if not os.access(root, os.W_OK | os.X_OK):
            return f"the root {root} is not writable for uid {os.getuid()}"
    return None
