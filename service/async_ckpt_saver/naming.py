"""Names for people: storage is reached through descriptors (`local_storage.below_root`), which mean nothing to them."""

from __future__ import annotations

import logging
import os
import re

from async_ckpt.core.errors import CheckpointError

_DESCRIPTOR = re.compile(r"/proc/self/fd/\d+")


class NamingFormatter(logging.Formatter):
    """A line is formatted in the thread that logs it, so what it names is open: the kernel knows its place."""

    def format(self, record: logging.LogRecord) -> str:
        return _DESCRIPTOR.sub(_place, super().format(record))


def rename_in(error: BaseException, place: str, directory: str) -> None:
    """In all that `error` says, `directory` takes the place of `place`."""
    if isinstance(error, OSError):
        for name in ("filename", "filename2"):
            value = getattr(error, name)
            if isinstance(value, str):
                setattr(error, name, _moved(value, place, directory))
    elif isinstance(error, CheckpointError):
        error.args = tuple(_moved(each, place, directory) for each in error.args)
        for name, value in vars(error).items():
            setattr(error, name, _moved(value, place, directory))


def _moved(value: object, place: str, directory: str) -> object:
    return re.sub(rf"{place}\b", lambda match: directory, value) if isinstance(value, str) else value


def _place(match: re.Match[str]) -> str:
    try:
        return os.readlink(match[0])
    except OSError:
        return match[0]
