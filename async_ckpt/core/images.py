"""Images as they are made: every byte that will ever be written to a slot is reserved before the first save."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from .errors import CheckpointError
from .private import private_directory, write_private
from .protocol import Layout
from .slots import MORE_SPACE, SHM, RunRecord, SlotPaths, StateFile, write_journal

_RACES = 100  # tries against savers that end just now
Ranges: TypeAlias = Sequence[tuple[int, int, int]]  # of image file number [0], the bytes [1] to [2]


def create_slots(run: Path, record: RunRecord, layout: Layout, only: Ranges | None = None) -> list[SlotPaths]:
    """Reserve every byte of every slot now: a full /dev/shm is an error here, never a SIGBUS in a later copy.

    With `only`, the image is sparse: nothing but these bytes is ever written to it, and only they are reserved. It has
    headers and documents all the same if it is the lead's (`record.lead` is None).
    Raises CheckpointError with the bytes needed and available. On any error nothing is left behind.
    """
    slots = [SlotPaths(run, index) for index in range(record.options.slots)]
    _require_space(image_bytes(layout) if only is None else _range_bytes(only), len(slots))
    try:
        _make_run(run)
        for slot in slots:
            if only is None:
                _create_image(slot.image, layout)
            else:
                _create_sparse_image(slot.image, layout, only)
                if record.lead is None:
                    _fill_in(slot.image, layout)
            StateFile.create(slot.state, record.options.world, part=record.hosts_write)
        write_journal(run, record)
    except CheckpointError:
        shutil.rmtree(run, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(run, ignore_errors=True)
        advice = f". {MORE_SPACE}; or attach with fewer slots" if error.errno == errno.ENOSPC else ""
        raise CheckpointError(f"cannot prepare the slots in {run}: {error}{advice}") from error
    return slots


def _make_run(run: Path) -> None:
    for _ in range(_RACES):
        private_directory(run.parent)
        with contextlib.suppress(FileNotFoundError):
            run.mkdir(mode=0o700)
            return
    raise CheckpointError(f"{run} cannot be made: somebody removes {run.parent} again and again")


def image_bytes(layout: Layout) -> int:
    page = mmap.PAGESIZE
    sizes = [file.total_bytes for file in layout.files] + [len(content) for content in layout.documents.values()]
    return sum(-(-size // page) * page for size in sizes)


def _range_bytes(ranges: Ranges) -> int:
    page = mmap.PAGESIZE
    return sum(-(-stop // page) * page - start // page * page for _, start, stop in ranges)


def _require_space(slot_bytes: int, slots: int) -> None:
    needed_bytes = slots * slot_bytes
    info = os.statvfs(SHM)
    available_bytes = info.f_bavail * info.f_frsize
    if needed_bytes > available_bytes:
        raise CheckpointError(
            f"/dev/shm has {available_bytes} bytes available, but {slots} slots of this model need {needed_bytes}. "
            f"{MORE_SPACE}; or attach with fewer slots"
        )


def _create_image(image: Path, layout: Layout) -> None:
    image.mkdir(mode=0o700)
    for file in layout.files:
        path = image / file.path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(fd, 0, file.total_bytes)
        finally:
            os.close(fd)
    _fill_in(image, layout)


def _fill_in(image: Path, layout: Layout) -> None:
    """What no rank writes."""
    for file in layout.files:
        with (image / file.path).open("r+b", buffering=0) as opened:
            opened.write(file.header)
    for name, content in layout.documents.items():
        path = image / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, content)


def _create_sparse_image(image: Path, layout: Layout, ranges: Ranges) -> None:
    image.mkdir(mode=0o700)
    parts: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, start, stop in ranges:
        parts[number].append((start, stop))
    for number, file in enumerate(layout.files):
        path = image / file.path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(fd, file.total_bytes)
            for start, stop in parts[number]:
                os.posix_fallocate(fd, start, stop - start)
        finally:
            os.close(fd)
