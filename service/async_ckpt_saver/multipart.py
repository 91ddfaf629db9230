"""One file of an image on its way into an object store: sent in parts straight from the image, hashed on the way."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence

import xxhash

from async_ckpt.core.manifest import FileEntry
from async_ckpt.core.object_errors import ObjectError
from async_ckpt.core.objects import PART_BYTES, Objects

from .datafile import CHUNK_BYTES, Digests, Written, open_source, written_file

assert PART_BYTES == CHUNK_BYTES  # so that a piece is a part, and a chunk of the manifest


def upload_image_file(
    objects: Objects, key: str, image: str, path: str, before_part: Callable[[], None], *, mapped: bool = True,
    stops: Sequence[int] | None = None,
) -> Written:  # fmt: skip
    """Send the image's file `path` to `key`; the hash is over exactly the bytes that were given to the client.

    `before_part` is called before each part is read, and ends the upload by raising. The image must not be truncated
    meanwhile (that is SIGBUS). Not `mapped`, for one that lies on a disk, whose errors would be SIGBUS too: each part
    is read. `stops`: where its pieces end, if it has no hash of its own. Raises ObjectError, OSError, and
    CheckpointError if `path` is no regular file.
    """
    digests = Digests(CHUNK_BYTES, stops)
    with _opened(image, path, mapped=mapped) as (length, read):
        if length == 0:
            return upload_bytes(objects, key, b"")

        def pieces() -> Iterator[memoryview]:
            nonlocal digests
            digests = Digests(CHUNK_BYTES, stops)  # each attempt sends all of it
            for start in range(0, length, PART_BYTES):
                before_part()
                piece = read(start, min(length, start + PART_BYTES))
                digests.update(piece, start)
                yield piece

        if length <= PART_BYTES:
            (piece,) = pieces()
            objects.write(key, piece)
        else:
            objects.upload(key, length, pieces)
    return written_file(length, digests, None, stops)


@contextlib.contextmanager
def _opened(image: str, path: str, *, mapped: bool) -> Iterator[tuple[int, Callable[[int, int], memoryview]]]:
    """The length of the file, and what gives its bytes [start, stop)."""
    source = open_source(image, path)
    with os.fdopen(source, "rb", buffering=0) as file:
        length = os.fstat(source).st_size
        if not mapped or length == 0:
            yield length, lambda start, stop: _read(file.fileno(), path, start, stop)
            return
        mapping = mmap.mmap(source, length, mmap.MAP_SHARED, mmap.PROT_READ)
    try:
        yield length, lambda start, stop: memoryview(mapping)[start:stop]
    finally:
        # Parts under way hold views of it: then it is unmapped with the last of them.
        with contextlib.suppress(BufferError):
            mapping.close()


def _read(fd: int, path: str, start: int, stop: int) -> memoryview:
    """Raises ObjectError, so that it is not taken for an error of the store, which may pass."""
    found = bytearray()
    try:
        while start + len(found) < stop and (data := os.pread(fd, stop - start - len(found), start + len(found))):
            found += data
    except OSError as error:
        raise ObjectError(f"{path!r} cannot be read: {error.strerror}; see `dmesg`", code=error.errno) from error
    if start + len(found) < stop:
        raise ObjectError(f"{path!r} was cut off while it was read")
    return memoryview(found)


def upload_bytes(objects: Objects, key: str, data: bytes) -> Written:
    """Send a small file that is in memory."""
    objects.write(key, data)
    return Written(FileEntry(len(data), xxhash.xxh3_128_hexdigest(data)), None)
