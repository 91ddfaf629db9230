"""Who writes which bytes of a checkpoint's files where every host writes its own part. Pure.

Lead and relays cut alike, so a hash is named by its place in a list, and nobody can be told to write anywhere else.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.pieces import piece_line

from .spans import Span, merged

PART_PIECE_BYTES = 8 << 20


def part_of(shares: Iterable[Sequence[Span]]) -> list[Span]:
    """The pieces that one host writes: what its ranks own, neighbours together, cut at every PART_PIECE_BYTES of a
    file."""
    return [piece for span in merged(itertools.chain.from_iterable(shares)) for piece in _cut(span)]


def _cut(span: Span) -> Iterator[Span]:
    start = span.start
    while start < span.stop:
        stop = min(span.stop, start // PART_PIECE_BYTES * PART_PIECE_BYTES + PART_PIECE_BYTES)
        yield Span(span.file, start, stop)
        start = stop


class Plan(msgspec.Struct, frozen=True):
    """`others`: the pieces of each other host. `own`: all that is left of the files that one of them has pieces of, for
    the lead; the other files are its own altogether."""

    sizes_bytes: list[int]
    own: list[Span]
    others: dict[str, list[Span]]

    @classmethod
    def of(cls, sizes_bytes: list[int], shares: Mapping[int, Sequence[Span]], hosts: Mapping[int, str]) -> Plan:
        """`shares` of the ranks on other hosts, and where each of them is."""
        by_host: dict[str, list[Sequence[Span]]] = defaultdict(list)
        for rank, spans in sorted(shares.items()):
            if spans:
                by_host[hosts[rank]].append(spans)
        own = [piece for span in rest_of(sizes_bytes, shares.values(), whole_files=False) for piece in _cut(span)]
        return cls(sizes_bytes, own, {host: part_of(each) for host, each in by_host.items()})

    @property
    def files(self) -> list[int]:
        """Those that several hosts write."""
        return sorted({piece.file for pieces in self.others.values() for piece in pieces})

    @property
    def count(self) -> int:
        return len(self.own) + sum(map(len, self.others.values()))

    def lines(self, own: Sequence[int], others: Mapping[str, Sequence[int]]) -> dict[int, list[str]]:
        """For the manifest, by file: `own` and `others` are the hashes, in the order of the pieces.

        Raises CheckpointError unless every byte has one: a file with a hole in it must not be committed.
        """
        found: dict[int, list[tuple[int, int, int]]] = {number: [] for number in self.files}
        for pieces, hashes in [(self.own, own), *((pieces, others[host]) for host, pieces in self.others.items())]:
            if len(pieces) != len(hashes):
                raise CheckpointError(f"{len(hashes)} hashes for {len(pieces)} pieces of a checkpoint")
            for piece, hashed in zip(pieces, hashes, strict=True):
                found[piece.file].append((piece.start, piece.stop, hashed))
        for number, each in found.items():
            each.sort()
            ends = [0, *(stop for _, stop, _ in each)]
            if [start for start, _, _ in each] != ends[:-1] or ends[-1] != self.sizes_bytes[number]:
                raise CheckpointError(
                    f"the hosts' parts do not make up file {number} of {self.sizes_bytes[number]} bytes"
                )
        return {
            number: [piece_line(stop, f"{hashed:016x}") for _, stop, hashed in each] for number, each in found.items()
        }


def rest_of(sizes_bytes: Sequence[int], shares: Iterable[Sequence[Span]], *, whole_files: bool) -> list[Span]:
    """What is in none of `shares`: of all files, or only of those that some share has a part of."""
    taken: dict[int, list[Span]] = defaultdict(list)
    for span in merged(itertools.chain.from_iterable(shares)):
        taken[span.file].append(span)
    rest = []
    for number, size_bytes in enumerate(sizes_bytes):
        if number not in taken and not whole_files:
            continue
        start = 0
        for span in taken.get(number, []):
            rest.append(Span(number, start, span.start))
            start = span.stop
        rest.append(Span(number, start, size_bytes))
    return [span for span in rest if span.start < span.stop]
