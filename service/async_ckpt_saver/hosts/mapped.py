"""The images of a run as bytes of this process, for what goes over a link and for what comes."""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Sequence

from ..image import RunImage
from .spans import Span

log = logging.getLogger(__name__)

# Linux 5.14; the mmap module has no names for them before Python 3.14.
_POPULATE_READ = 22
_POPULATE_WRITE = 23
_AT_ONCE_BYTES = 32 << 20  # of pages that are mapped while no other thread runs


class MappedImages:
    """Files are mapped when they are first needed. A view must not outlive `close`."""

    def __init__(self, image: RunImage, *, writable: bool) -> None:
        self._image = image
        self._writable = writable
        self._maps: dict[tuple[int, int], mmap.mmap] = {}
        self._views: dict[tuple[int, int], memoryview] = {}

    def view(self, slot: int, file: int) -> memoryview:
        """Image file number `file` of a slot. Raises OSError."""
        view = self._views.get((slot, file))
        if view is None:
            path = self._image.slots[slot].image / self._image.record.files[file]
            access = mmap.PROT_READ | (mmap.PROT_WRITE if self._writable else 0)
            with path.open("r+b" if self._writable else "rb") as opened:
                mapped = mmap.mmap(opened.fileno(), 0, prot=access)
            self._maps[slot, file] = mapped
            view = self._views[slot, file] = memoryview(mapped)
        return view

    def populate(self, spans: Sequence[Span]) -> None:
        """Map the pages of `spans` in all slots, so that nobody waits for the faults later. Never raises."""
        advice = _POPULATE_WRITE if self._writable else _POPULATE_READ
        try:
            for slot in range(len(self._image.slots)):
                for span in spans:
                    self.view(slot, span.file)
                    first = span.start // mmap.PAGESIZE * mmap.PAGESIZE
                    for start in range(first, span.stop, _AT_ONCE_BYTES):
                        self._maps[slot, span.file].madvise(advice, start, min(_AT_ONCE_BYTES, span.stop - start))
        except (OSError, KeyError, ValueError) as error:  # an old kernel, or the run has ended just now
            log.debug("the first transfer will be slower, pages cannot be mapped ahead: %s", error)

    def close(self) -> None:
        """What is still being sent keeps its mapping until it is gone."""
        self._views.clear()
        for mapped in self._maps.values():
            with contextlib.suppress(BufferError):
                mapped.close()
        self._maps.clear()
