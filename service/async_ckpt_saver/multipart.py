"""One file of an image on its way into an object store: sent in parts straight from the image, hashed on the way."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator

import xxhash

from async_ckpt.core.manifest import FileEntry
from async_ckpt.core.objects import PART_BYTES, Objects

from .datafile import CHUNK_BYTES, Digests, Written, open_source

assert PART_BYTES == CHUNK_BYTES  # so that a piece is a part, and a chunk of the manifest


def upload_image_file(objects: Objects, key: str, image: str, path: str, before_part: Callable[[], None]) -> Written:
    """Send the image's file `path` to `key`; the hash is over exactly the bytes that were given to the client.

    `before_part` is called before each part is read, and ends the upload by raising. The image must not be truncated
    meanwhile (that is SIGBUS). Raises ObjectError, and CheckpointError if `path` is no regular file.
    """
    source = open_source(image, path)
    try:
        length = os.fstat(source).st_size
        if length == 0:
            return upload_bytes(objects, key, b"")
        mapping = mmap.mmap(source, length, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(source)
    digests = Digests(CHUNK_BYTES)

    def pieces() -> Iterator[memoryview]:
        nonlocal digests
        digests = Digests(CHUNK_BYTES)  # each attempt sends all of it
        for start in range(0, length, PART_BYTES):
            before_part()
            piece = memoryview(mapping)[start : start + PART_BYTES]
            digests.update(piece, start)
            yield piece

    try:
        if length <= PART_BYTES:
            (piece,) = pieces()
            objects.write(key, piece)
        else:
            objects.upload(key, length, pieces)
    finally:
        # Parts under way hold views of it: then it is unmapped with the last of them.
        with contextlib.suppress(BufferError):
            mapping.close()
    return Written(FileEntry(length, digests.whole), None, digests.chunks)


def upload_bytes(objects: Objects, key: str, data: bytes) -> Written:
    """Send a small file that is in memory."""
    objects.write(key, data)
    return Written(FileEntry(len(data), xxhash.xxh3_128_hexdigest(data)), None)
