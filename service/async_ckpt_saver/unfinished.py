"""Which directories have uploads to a second tier that are not done, noted in shared memory beside the runs: a run that
has ended left nothing else there, and its saver may be killed before the upload has ended."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_MESSAGE_BYTES
from async_ckpt.core.private import read_capped
from async_ckpt.core.protocol import Options, decode_stored
from async_ckpt.core.slots import endpoint_key, replace_file, shm_root

log = logging.getLogger(__name__)


class Unfinished:
    """The notes of the savers of `endpoint`, who may be killed at any time. They outlive a saver, not the machine."""

    def __init__(self, endpoint: str) -> None:
        self._prefix = f"uploads-{endpoint_key(endpoint)}-"

    def note(self, options: Options) -> None:
        """Without it the upload is made all the same, unless this saver is killed: then by the next job."""
        try:
            replace_file(self._path(options.directory, options.upload_to), msgspec.msgpack.encode(options))
        except (OSError, CheckpointError) as error:
            log.warning("that %s is still to be uploaded to %s cannot be noted: %s", options.directory,
                        options.upload_to, error)  # fmt: skip

    def forget(self, options: Options) -> None:
        self._path(options.directory, options.upload_to).unlink(missing_ok=True)

    def found(self) -> list[Options]:
        """What an earlier saver has left. A note that cannot be read is removed; another user's is not ours."""
        found = []
        for path in sorted(shm_root().glob(f"{self._prefix}*")):
            try:
                if path.suffix == ".tmp":
                    raise OSError("it was not written to its end")
                if path.lstat().st_uid == os.getuid():
                    found.append(decode_stored(read_capped(path, MAX_MESSAGE_BYTES), Options))
            except (OSError, msgspec.DecodeError) as error:
                log.warning("the note %s cannot be read, and is removed: %s", path, error)
                path.unlink(missing_ok=True)
        return found

    def _path(self, directory: str, url: str) -> Path:
        name = hashlib.sha256(os.fsencode(f"{directory}\0{url}")).hexdigest()[:16]
        return shm_root() / f"{self._prefix}{name}"
