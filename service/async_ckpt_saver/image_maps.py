"""The files of a run's image as its saver maps them: once, not at every save."""

from __future__ import annotations

import mmap
import os
import threading

# Of one run. Page tables take a five-hundredth of it: 8 MiB, which no other process has a use for.
_KEPT_BYTES = 4 << 30


class ImageMaps:
    """To map a file of shared memory and to unmap it takes the kernel more time than to write it by O_DIRECT: each page
    is looked up, entered, and taken out again.

    A mapping holds the memory of a file that was removed, so whoever removes an image has to say so by `forget`.
    Thread-safe: a commit may be under way meanwhile, and its mapping goes with it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, str], tuple[tuple[int, int, int], mmap.mmap]] = {}
        self._forgotten: set[str] = set()

    def map(self, image: str, path: str, source: int) -> mmap.mmap:
        """The file `path` of the image, open as `source` and not empty, to be read and not to be closed."""
        info = os.fstat(source)
        # As long as it is mapped no other file gets its number.
        identity = info.st_dev, info.st_ino, info.st_size
        with self._lock:
            known = self._kept.get((image, path))
            if known is not None and known[0] == identity:
                return known[1]
        mapped = map_to_read(source, info.st_size)
        with self._lock:
            self._kept.pop((image, path), None)
            kept_bytes = sum(len(each) for _, each in self._kept.values())
            if image not in self._forgotten and kept_bytes + len(mapped) <= _KEPT_BYTES:
                self._kept[image, path] = identity, mapped
        return mapped

    def forget(self, image: str) -> None:
        """Let go of an image that is removed, for good."""
        with self._lock:
            self._forgotten.add(image)
            for place in [place for place in self._kept if place[0] == image]:
                del self._kept[place]


def map_to_read(source: int, length: int) -> mmap.mmap:
    return mmap.mmap(source, length, mmap.MAP_SHARED, mmap.PROT_READ)
