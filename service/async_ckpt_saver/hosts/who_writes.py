"""Whether every host writes its part of a run's checkpoints itself, or hands it to the lead. Pure.

All of them do, or none: a saver that was not told `--shared-fs direct` is not asked to write files for another host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from async_ckpt.core.location import Url, location_of
from async_ckpt.core.pieces import MAX_PIECES
from async_ckpt.core.protocol import Options

from .parts import Plan
from .spans import Span


class Relay(Protocol):
    """A saver that speaks for ranks of another host."""

    host: str
    name: str
    direct: bool


def objection(options: Options, relays: Sequence[Relay]) -> str:
    """Why they do not: `relays`, those of this run, are asked to. "" if they do."""
    if isinstance(location_of(options.directory), Url):
        return "an object store takes no ranges of a file"
    if options.upload_to:
        return "with tiers the first one is a directory of one host"
    if options.replicas:
        return "replicas=1 copies from the lead's image, which would hold the lead's part alone"
    unwilling = sorted({relay.name for relay in relays if not relay.direct})
    if unwilling:
        return f"the saver of {', '.join(unwilling[:4])} was not started with --shared-fs direct"
    if len({id(relay) for relay in relays}) > len({relay.host for relay in relays}):
        return "a host has two savers"
    return ""


def too_many(sizes_bytes: list[int], shares: Mapping[int, Sequence[Span]], hosts: Mapping[int, str]) -> str:
    """Why they do not, as far as that lies in what each host has: "" if they do."""
    count = Plan.of(sizes_bytes, shares, hosts).count
    if count <= MAX_PIECES:
        return ""
    return f"the hosts' parts are {count} pieces, at most {MAX_PIECES} have room in a manifest (MAX_PIECES)"
