"""The messages between a rank and its saver: msgpack structs over one ZeroMQ DEALER-ROUTER pair.

A rank's routing id is its `identity`, random per attach, so a restarted saver knows who speaks without a new
handshake. `Staged`, `Skipped`, `Failed` and `Bye` carry a `seq` and are repeated until `Ack` names it, because ZeroMQ
over ipc drops what it said it sent when the sender exits: delivery is only what the other side has acknowledged.
Receiving any of them twice is harmless.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .region import Region
from .retention_policy import Policy

PROTOCOL = 1
MAX_MESSAGE_BYTES = 256 << 20
MAX_WORLD = 65_536
MAX_SLOTS = 16


class _Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    pass


class Process(msgspec.Struct, frozen=True):
    """A process that can be watched: pid numbers are reused and differ between pid namespaces."""

    pid: int
    start_ticks: int
    pid_namespace: str


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """ "I hold `region` of tensor number `tensor` (in the file's order) of image file number `file`."""

    file: int
    tensor: int
    region: Region


class ImageFile(msgspec.Struct, frozen=True):
    """One file of the checkpoint directory to come: its first bytes and its whole length."""

    path: str
    header: bytes
    total_bytes: int


class Layout(msgspec.Struct, frozen=True):
    """The checkpoint directory to come: files that each save fills anew, documents that are the same in every save."""

    files: tuple[ImageFile, ...]
    documents: dict[str, bytes]


class Options(msgspec.Struct, frozen=True):
    """What all ranks of a run must agree on, layout aside."""

    directory: str
    world: int
    slots: int
    policy: Policy
    timeout_s: float
    verify_replicas: bool = False


class Register(_Message, frozen=True):
    """First word of a rank. `layout` comes from rank 0; the others send its hash only."""

    protocol: int
    options: Options
    job: str
    rank: int
    process: Process
    launcher: Process | None
    layout_hash: str
    layout: Layout | None
    claims: list[Claim]
    versions: dict[str, str]


class LayoutSent(_Message, frozen=True):
    layout: Layout


class Refuse(_Message, frozen=True):
    """This rank cannot take part: every other rank is told why instead of waiting for it."""

    options: Options
    job: str
    rank: int
    process: Process
    reason: str


class Ready(_Message, frozen=True):
    """This rank has mapped and pinned its slots."""


class Staged(_Message, frozen=True):
    seq: int
    slot: int
    step: int
    copy_s: float


class Skipped(_Message, frozen=True):
    seq: int
    slot: int
    step: int
    reason: str


class Failed(_Message, frozen=True):
    seq: int
    slot: int
    step: int
    reason: str


class Bye(_Message, frozen=True):
    """The rank leaves on purpose; everything it had in flight is settled."""

    seq: int


class Ping(_Message, frozen=True):
    """Sent every second: the lease. `unsettled` are the steps whose outcome the rank still waits for."""

    unsettled: list[int]


FromRank = Register | LayoutSent | Refuse | Ready | Staged | Skipped | Failed | Bye | Ping


class LayoutWanted(_Message, frozen=True):
    """The rank's layout hash differs from rank 0's: send the layout so that the difference can be named."""


class Granted(_Message, frozen=True):
    """All ranks are here and their claims cover every byte. `owned` indexes this rank's claims, `replicated` those that
    other ranks hold as well and whose hashes its records have to give; empty unless replicas are to be verified."""

    run: str
    slot_directories: list[str]
    owned: list[int]
    replicated: list[int]


class Resume(msgspec.Struct, frozen=True):
    """The newest committed checkpoint when the run started; `image` is its slot in RAM if one is still held."""

    step: int
    path: str
    image: str | None


class Started(_Message, frozen=True):
    """All ranks are ready: saves may begin. The same `resume` goes to every rank."""

    resume: Resume | None
    newest_step: int | None


class Refused(_Message, frozen=True):
    reason: str


class Ack(_Message, frozen=True):
    seq: int


class Settled(_Message, frozen=True):
    """The end of one step: its slot is free again."""

    step: int
    slot: int
    outcome: Literal["committed", "skipped", "failed"]
    reason: str = ""
    path: str = ""
    bytes: int = 0
    write_s: float = 0.0
    commit_s: float = 0.0


class Pong(_Message, frozen=True):
    """`incarnation` differs after a restart of the saver; `known` is False if it holds no run of this rank."""

    incarnation: str
    known: bool


FromSaver = LayoutWanted | Granted | Started | Refused | Ack | Settled | Pong

_encoder = msgspec.msgpack.Encoder()
_from_rank = msgspec.msgpack.Decoder(FromRank)
_from_saver = msgspec.msgpack.Decoder(FromSaver)


def encode(message: FromRank | FromSaver) -> bytes:
    return _encoder.encode(message)


def decode_from_rank(payload: bytes | memoryview) -> FromRank:
    """Raises msgspec.DecodeError (or its subclass ValidationError) on anything but a valid message of a rank."""
    message: FromRank = _decode(_from_rank, payload)
    return message


def decode_from_saver(payload: bytes | memoryview) -> FromSaver:
    """Raises msgspec.DecodeError (or its subclass ValidationError) on anything but a valid message of a saver."""
    message: FromSaver = _decode(_from_saver, payload)
    return message


def _decode(decoder: msgspec.msgpack.Decoder[Any], payload: bytes | memoryview) -> Any:
    try:
        return decoder.decode(payload)
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these two through as they are
        raise msgspec.DecodeError(str(error)) from error


class SaveRecord(msgspec.Struct, frozen=True):
    """What a rank says of one save besides tensors; it lies beside the slot, so it survives the rank. Metrics and extra
    count as rank 0 gives them; `documents` are small files of this save, by path; `replica_hashes` are xxh3-64 of what
    other ranks should hold alike, by a name of the part."""

    step: int
    metrics: dict[str, Any]
    extra: Any
    documents: dict[str, bytes]
    replica_hashes: dict[str, int] = {}
