"""One file on its way to storage: written past the page cache where possible, hashed on the way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import msgspec
import xxhash

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import FileEntry
from async_ckpt.core.pieces import digest_of_pieces, piece_line

from .image_maps import ImageMaps, map_to_read
from .write_behind import PIECE_BYTES, WriteBehind

logger = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
# O_DIRECT wants offsets, lengths and memory in multiples of the device's block; 4 KiB fits every common one.
ALIGN_BYTES = 4096
# Hashed twice while it lies in the cache, for the file and for its chunk: 20 % more CPU than once, in pieces of a whole
# chunk it is 75 %.
_HASHED_BYTES = 256 << 10
_NEVER = 1 << 63
# Below this the direct path saves nothing.
DIRECT_MIN_BYTES = 1 << 20
NOT_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP})

StepHook = Callable[[str], None]


class Written(msgspec.Struct, frozen=True):
    """`direct` is None for a file too small for O_DIRECT, False if the filesystem refused it. `chunks` are the xxh3-64
    of every CHUNK_BYTES of a file that is longer than that, else empty. `pieces` are the lines of a file that has no
    hash of its own (`core.pieces`)."""

    entry: FileEntry
    direct: bool | None
    chunks: tuple[str, ...] = ()
    pieces: tuple[str, ...] = ()


class Digests:
    """The hash of a whole file and those of its chunks, `chunk_bytes` each, or up to each of `stops`; given the bytes
    once, in order."""

    def __init__(self, chunk_bytes: int, stops: Sequence[int] | None = None) -> None:
        self._stops = iter(stops) if stops is not None else itertools.count(chunk_bytes, chunk_bytes)
        self._stop = 0
        self._whole = xxhash.xxh3_128()
        self._chunk = xxhash.xxh3_64()
        self._done: list[str] = []  # a hasher takes forty times as much memory

    def update(self, data: memoryview, start: int) -> None:
        position, end = start, start + len(data)
        while position < end:
            if position == self._stop:
                self._next(position)
            upto = min(end, position + _HASHED_BYTES, self._stop)
            with data[position - start : upto - start] as piece:
                self._whole.update(piece)
                self._chunk.update(piece)
            position = upto

    def _next(self, position: int) -> None:
        if position:
            self._done.append(self._chunk.hexdigest())
        self._chunk = xxhash.xxh3_64()
        self._stop = next(self._stops, _NEVER)

    @property
    def whole(self) -> str:
        return self._whole.hexdigest()

    @property
    def all(self) -> tuple[str, ...]:
        """Of every chunk."""
        return (*self._done, self._chunk.hexdigest()) if self._stop else ()

    @property
    def chunks(self) -> tuple[str, ...]:
        """Of every chunk, if there is more than one."""
        return self.all if self._done else ()


def written_file(length: int, digests: Digests, direct: bool | None, stops: Sequence[int] | None) -> Written:
    """Of a file whose hash is that of its pieces, if `stops` says where they end."""
    if stops is None:
        return Written(FileEntry(length, digests.whole), direct, digests.chunks)
    return in_pieces(length, [piece_line(*each) for each in zip(stops, digests.all, strict=False)], direct)


def in_pieces(length: int, lines: Sequence[str], direct: bool | None) -> Written:
    return Written(FileEntry(length, pieces_xxh3_128=digest_of_pieces(lines)), direct, pieces=tuple(lines))


def write_image_file(
    image: str,
    path: str,
    destination: str,
    hashing: Executor,
    step_hook: StepHook,
    stops: Sequence[int] | None = None,
    maps: ImageMaps | None = None,
) -> Written:
    """Copy the image's file `path` to `destination`, which must not exist yet, and make its content durable. `stops`:
    where its pieces end, if it has no hash of its own.

    The hash is over exactly the bytes handed to the kernel's write. Private memory is bounded whatever the file's
    size; the image must not be truncated meanwhile (that is SIGBUS). `hashing` runs the hash beside the write.
    `maps` keeps the image mapped for the next time.
    Raises OSError, and CheckpointError if `path` is no regular file or leads through a symbolic link.
    """
    source = open_source(image, path)
    try:
        length = os.fstat(source).st_size
        if length == 0:
            return write_bytes(b"", path, destination, step_hook)
        mapping = map_to_read(source, length) if maps is None else maps.map(image, path, source)
    finally:
        os.close(source)
    try:
        output = _Output(destination, direct=length >= DIRECT_MIN_BYTES)
        with output, memoryview(mapping) as view:
            return _stream(view, path, output, hashing, step_hook, stops)
    finally:
        # A failed write leaves its traceback holding views of the mapping: it is then unmapped with the exception.
        with contextlib.suppress(BufferError):
            if maps is None:
                mapping.close()


def write_bytes(data: bytes, path: str, destination: str, step_hook: StepHook) -> Written:
    """Write a small file that is in memory, durably; `destination` must not exist yet. Raises OSError."""
    with _Output(destination, direct=False) as output, memoryview(data) as view:
        output.write(view, 0)
        step_hook(f"fsync:{path}")
        output.sync()
    return Written(FileEntry(len(data), xxhash.xxh3_128_hexdigest(data)), None)


def _stream(
    view: memoryview, path: str, output: _Output, hashing: Executor, step_hook: StepHook, stops: Sequence[int] | None
) -> Written:
    length = len(view)
    digests = Digests(CHUNK_BYTES, stops)
    # The last partial block cannot go out by O_DIRECT.
    aligned = length - length % ALIGN_BYTES
    edges = sorted({*range(0, aligned, CHUNK_BYTES), aligned, length})
    for start, stop in itertools.pairwise(edges):
        step_hook(f"chunk:{path}")
        with view[start:stop] as chunk:
            hashed = hashing.submit(digests.update, chunk, start)
            try:
                if start == aligned:
                    output.buffered()
                output.write(chunk, start)
            finally:
                # The hash runs 5-10 times faster than the disk; waiting for it bounds what is in flight to one chunk.
                hashed.result()
    step_hook(f"fsync:{path}")
    output.sync()
    direct = None if length < DIRECT_MIN_BYTES else output.direct
    return written_file(length, digests, direct, stops)


class _Output:
    """A new file being written, by O_DIRECT as long as the filesystem takes it; `direct` turns False if it refuses."""

    def __init__(self, path: str, *, direct: bool) -> None:
        self.path = path
        self.direct = direct
        self._behind: WriteBehind | None = None  # of a large file that has to go through the page cache
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        if direct:
            try:
                self._fd = os.open(path, flags | os.O_DIRECT, 0o666)
                return
            except OSError as error:
                if error.errno not in NOT_DIRECT:
                    raise
                self._refused("open", error)
            # The kernel may have made the file before it refused the flag.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._fd = os.open(path, flags, 0o666)
        if direct:
            self._behind = WriteBehind(self._fd)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`, however many calls that takes; buffered from where O_DIRECT is refused."""
        done = 0
        while done < len(data):
            if done % ALIGN_BYTES:
                # A short write ended inside a block: O_DIRECT has no aligned start from there.
                self.buffered()
            most = len(data) if self._behind is None else done + PIECE_BYTES
            try:
                written = os.pwrite(self._fd, data[done:most], offset + done)
            except OSError as error:
                if error.errno not in NOT_DIRECT or not self.buffered():
                    raise
                self._refused("write", error)
                self._behind = WriteBehind(self._fd)
                continue
            if written == 0:
                raise OSError(errno.EIO, "the filesystem accepts no more bytes", self.path)
            if self._behind is not None:
                self._behind.wrote(offset + done, written)
            done += written

    def buffered(self) -> bool:
        """Leave O_DIRECT for the rest of the file; needed for bytes that are no whole block. False if it was left."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        if not flags & os.O_DIRECT:
            return False
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return True

    def sync(self) -> None:
        """Make the content durable. After an OSError here nothing is known of it: the file must not be used."""
        os.fdatasync(self._fd)

    def _refused(self, operation: str, error: OSError) -> None:
        self.direct = False
        logger.info("%s goes through the page cache: O_DIRECT is refused at %s (%s)", self.path, operation, error)


def open_source(image: str, path: str) -> int:
    """Open a file of the image; no component below `image` may be a symbolic link, which could lead anywhere."""
    try:
        fd = open_below(image, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path!r} cannot be taken from the image {image}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path!r} in the image {image} is not a regular file")
    return fd


def open_below(directory: str, path: str, flags: int) -> int:
    """Open what is there at `path`, by no symbolic link below `directory`. Raises OSError, which names all of it."""
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    *folders, name = path.split("/")
    parent: int | None = None
    try:
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for folder in folders:
            child = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            os.close(parent)
            parent = child
        return os.open(name, flags, dir_fd=parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.path.join(directory, path)) from error
    finally:
        if parent is not None:
            os.close(parent)
