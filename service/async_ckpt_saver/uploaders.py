"""The uploads of one directory to all second tiers that its runs have named, and what is noted of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import location_of
from async_ckpt.core.protocol import FromSaver, Options, Uploaded

from .services import Services
from .upload_status import UploadStatus
from .uploader import Uploader

log = logging.getLogger(__name__)


class _Listener(Protocol):
    def tell_all(self, message: FromSaver) -> None: ...


class Uploaders:
    """`listeners` are the runs that live: what became of an upload is told to all of them."""

    def __init__(self, services: Services, directory: str, listeners: Callable[[], Iterable[_Listener]]) -> None:
        self._services = services
        self._directory = directory
        self._listeners = listeners
        self._uploaders: dict[str, Uploader] = {}
        self._noted: dict[str, Options] = {}

    @property
    def idle(self) -> bool:
        return all(each.idle for each in self._uploaders.values())

    def of(self, options: Options) -> Uploader | None:
        """The one of a run, which begins or is gone on with; None if it names no second tier, or one outside the roots
        that a restarted saver was given: what the run has staged is committed all the same."""
        if not options.upload_to:
            return None
        url = str(location_of(options.upload_to))
        self._uploaders = {name: each for name, each in self._uploaders.items() if name == url or not each.idle}
        if url not in self._uploaders:
            try:
                self._uploaders[url] = Uploader(
                    self._services, self._directory, url, self._tell, lambda: self._rest(url)
                )
            except CheckpointError as error:
                log.error("nothing of %s is uploaded: %s", self._directory, error)
                return None
        self._uploaders[url].serve(options)
        return self._uploaders[url]

    def take_up(self, options: Options) -> None:
        """An earlier saver has noted it: its run is over."""
        if self.of(options) is not None:
            self._noted[str(location_of(options.upload_to))] = options

    def run_ended(self, options: Options) -> None:
        """While its image was there, that told the next saver what may be missing in the second tier."""
        unfinished = self._services.unfinished
        if unfinished is None or not options.upload_to:
            return
        url = str(location_of(options.upload_to))
        uploader = self._uploaders.get(url)
        if uploader is None or (uploader.idle and not uploader.failing):
            unfinished.forget(options)
        else:
            unfinished.note(options)
            self._noted[url] = options

    def _rest(self, url: str) -> None:
        if url in self._noted and not self._uploaders[url].failing and self._services.unfinished is not None:
            self._services.unfinished.forget(self._noted.pop(url))

    def status(self) -> list[UploadStatus]:
        return [each.status() for each in self._uploaders.values()]

    async def close(self) -> None:
        for each in self._uploaders.values():
            await each.close()

    def _tell(self, message: Uploaded) -> None:
        for each in self._listeners():
            each.tell_all(message)
