"""What stands for the hash of a file that several hosts have written: nobody has seen all of it, so each of its pieces
has one.

A piece is a line of text, "stop hash": it ends before byte `stop` of the file, and begins where the one before it ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import msgspec
import xxhash

from .errors import CheckpointError

MAX_PIECES = 1 << 18  # of a checkpoint: the manifest, at most 16 MiB, has some 40 bytes for each
PieceLine: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[1-9][0-9]{0,18} [0-9a-f]{16}$")]


def piece_line(stop: int, xxh3_64: str) -> str:
    return f"{stop} {xxh3_64}"


def stops_of(lines: Sequence[str]) -> list[int]:
    return [int(line.partition(" ")[0]) for line in lines]


def hashes_of(lines: Sequence[str]) -> list[str]:
    return [line.partition(" ")[2] for line in lines]


def digest_of_pieces(lines: Sequence[str]) -> str:
    """The xxh3-128 of the lines, each with a newline behind it: `jq -r '.pieces[PATH][]' | xxhsum -H2` says it too."""
    return xxhash.xxh3_128_hexdigest("".join(f"{line}\n" for line in lines).encode())


def check_pieces(path: str, size_bytes: int, digest: str, lines: Sequence[str]) -> None:
    """Raises CheckpointError unless they make up a file of so many bytes, and are those that `digest` stands for."""
    stops = stops_of(lines)
    in_order = all(before < stop for before, stop in itertools.pairwise([0, *stops]))
    if not in_order or (stops or [0])[-1] != size_bytes:
        raise CheckpointError(f"the pieces of {path!r} do not make up its {size_bytes} bytes")
    if digest_of_pieces(lines) != digest:
        raise CheckpointError(f"the pieces of {path!r} do not hash as its entry says")
