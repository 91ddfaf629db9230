"""What neither side accepts more of. A cap is far above what any training needs, and far below what would hurt.

Who is over one is told its name, the value and the cap; nothing is cut off silently.
"""

from __future__ import annotations

from typing import Any

from .errors import CheckpointError

MAX_MESSAGE_BYTES = 256 << 20  # of a message: ZeroMQ ends the connection of whoever sends more
MAX_RUNS = 1024  # directories that one saver serves at a time
MAX_REGISTRATIONS = 256  # of them those whose ranks are still gathering, which hold what their ranks have sent
MAX_IDENTITIES = 262_144  # ranks of all runs
MAX_REMEMBERED_REFUSALS = 64  # jobs a directory: the oldest is forgotten for the newest
MAX_WORLD = 65_536
MAX_SLOTS = 16
MAX_FILES = 65_536  # of a checkpoint
MAX_TENSORS = 1 << 20  # of all files of a checkpoint
MAX_DIMENSIONS = 64  # of a tensor
MAX_CLAIMS = 1 << 20  # of a rank
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; safetensors itself refuses more
MAX_RECORD_BYTES = 256 << 20  # what a rank says of one save besides tensors, its documents included
MAX_DOCUMENT_BYTES = 256 << 20  # of one JSON file that is read back
MAX_JOURNAL_BYTES = 128 << 20  # of a run's journal: grows with ranks and files
MAX_MANIFEST_BYTES = 16 << 20
MAX_PATH_BYTES = 1024  # within a checkpoint
MAX_DIRECTORY_CHARS = 4096
MAX_ADDRESS_CHARS = 512  # of an endpoint, or of an address to bind
KEY_CHARS = 40  # of a CURVE key: 32 bytes in Z85; it has these or none
MAX_NAME_CHARS = 4096  # of a job, a layout hash, a version
MAX_REASON_CHARS = 16_384  # the one text that is cut: why a step failed has to arrive
MAX_SPANS = 4096  # of what a saver tells of one step
MAX_UNSETTLED = 256  # steps that a rank asks about at once; it has at most MAX_SLOTS open
MAX_SEQUENCE = 2**63 - 1
MAX_STEP = 10**18 - 1  # steps end up in int64 tensors and file names; 18 digits keep both safe
MAX_PID = 1 << 22  # Linux has no greater
MAX_TIMEOUT_S = 366 * 86_400.0
MAX_JSON_DEPTH = 100  # of state and of `extra`: whoever reads it, in any language, must not run out of stack


def check_depth(value: Any, what: str) -> None:
    """Raises CheckpointError naming `what` if lists and dicts are nested in `value` deeper than MAX_JSON_DEPTH, or in
    themselves."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list | tuple):
                inner += each
        level = [each for each in inner if isinstance(each, dict | list | tuple)]
        if not level and not inner:
            return
    raise CheckpointError(f"{what} is nested deeper than {MAX_JSON_DEPTH} levels, or in itself: make it flatter")
