"""The messages between a rank and its saver: msgpack structs over one ZeroMQ DEALER-ROUTER pair.

A rank's routing id is its `identity`, random per attach, so a restarted saver knows who speaks without a new
handshake. `Staged`, `Skipped`, `Failed` and `Bye` carry a `seq` and are repeated until `Ack` names it, because ZeroMQ
over ipc drops what it said it sent when the sender exits: delivery is only what the other side has acknowledged.
Receiving any of them twice is harmless. `Settled` acknowledges `Staged` as well, so a save has one answer; a saver that
hears `Staged` again before it knows the outcome sends the `Ack`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from .clock import Clock
from .errors import CheckpointError
from .limits import (
    MAX_MESSAGE_BYTES,
    MAX_SEQUENCE,
    MAX_SLOTS,
    MAX_SPANS,
    MAX_STEP,
    MAX_UNSETTLED,
)
from .terms import Address as Address
from .terms import Claim as Claim
from .terms import Claims as Claims
from .terms import ImageFile as ImageFile
from .terms import Key as Key
from .terms import Layout as Layout
from .terms import Lead as Lead
from .terms import Name as Name
from .terms import Options as Options
from .terms import Process as Process

PROTOCOL = 1

# Checked while a message is decoded, so nothing beyond them is ever acted on.
_Slot = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]
_Step = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)]
_Sequence = Annotated[int, msgspec.Meta(ge=0, le=MAX_SEQUENCE)]
T = TypeVar("T")


class _Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    pass


class LeadWanted(_Message, frozen=True):
    """Rank 0 of a job on several hosts asks its saver, before it registers, to be the lead: to listen for the savers of
    the other hosts. `address` is "IP:PORT" of an interface of this host ("[IP]:PORT" for IPv6), port 0 for any that is
    free. `allow` is the public CURVE key that the other savers will show, besides those of the saver's own list; empty
    with `plain`, a link without CURVE. Asked twice it is answered alike."""

    address: Address
    allow: Key
    plain: bool = False


class Register(_Message, frozen=True):
    """First word of a rank. `layout` comes from rank 0; the others send its hash only. `shm` tells which /dev/shm the
    rank sees: `slots.shm_identity`. `lead` is None on the host of rank 0; elsewhere the rank's saver relays to it.
    `trace`, of rank 0: it wants a `Traced` of each step that was to be committed."""

    protocol: int
    options: Options
    job: Name
    rank: int
    process: Process
    launcher: Process | None
    shm: Name
    layout_hash: Name
    layout: Layout | None
    claims: Claims
    versions: Annotated[dict[Name, Name], msgspec.Meta(max_length=64)]
    lead: Lead | None = None
    trace: bool = False


class LayoutSent(_Message, frozen=True):
    layout: Layout


class Refuse(_Message, frozen=True):
    """This rank cannot take part: every other rank is told why instead of waiting for it. `lead` as in `Register`."""

    options: Options
    job: Name
    rank: int
    process: Process
    reason: str
    lead: Lead | None = None


class Ready(_Message, frozen=True):
    """This rank has mapped and pinned its slots."""


class Staged(_Message, frozen=True):
    """`stall_s`: what the save has cost the training thread up to now, when nothing can hold it up any more."""

    seq: _Sequence
    slot: _Slot
    step: _Step
    copy_s: float
    stall_s: float = 0.0


class Skipped(_Message, frozen=True):
    seq: _Sequence
    slot: _Slot
    step: _Step
    reason: str


class Failed(_Message, frozen=True):
    seq: _Sequence
    slot: _Slot
    step: _Step
    reason: str


class Bye(_Message, frozen=True):
    """The rank leaves on purpose; everything it had in flight is settled."""

    seq: _Sequence


class Ping(_Message, frozen=True):
    """Sent every second: the lease. `unsettled` are the steps whose outcome the rank still waits for, `not_uploaded`
    those that are committed and of whose upload it has not heard."""

    unsettled: Annotated[list[_Step], msgspec.Meta(max_length=MAX_UNSETTLED)]
    not_uploaded: Annotated[list[_Step], msgspec.Meta(max_length=MAX_UNSETTLED)] = []


class Promise(_Message, frozen=True):
    """Where a rank stands while all agree on the optimizer step to stop after. `steps`: it has begun so many and will
    begin one more at most until it hears `StopAfter`; None: it promises nothing, or no longer. `stop`: it has heard.
    Said again every second until it has."""

    steps: _Step | None
    stop: _Step | None


class StatusWanted(_Message, frozen=True):
    """Anybody on the socket asks how the saver is; it takes no part in a run."""


FromRank = (
    Register
    | LayoutSent
    | Refuse
    | Ready
    | Staged
    | Skipped
    | Failed
    | Bye
    | Ping
    | Promise
    | StatusWanted
    | LeadWanted
)


class LeadOpen(_Message, frozen=True):
    """Answers `LeadWanted`: where the link is listened on ("tcp://IP:PORT", the port as bound), and the saver's public
    CURVE key, empty for a plain link. `Refused` instead if it cannot be."""

    endpoint: str
    server_key: bytes


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
    """The newest committed checkpoint when the run started; `image` is where it lies in RAM, if it does. `digest` is
    that of its manifest, in hex, if hosts keep whole copies of it; "" otherwise."""

    step: int
    path: str
    image: str | None
    digest: str = ""


class Started(_Message, frozen=True):
    """All ranks are ready: saves may begin. The same `resume` goes to every rank."""

    resume: Resume | None
    newest_step: int | None


class Refused(_Message, frozen=True):
    reason: str


class Rejected(_Message, frozen=True):
    """What this rank has sent means nothing to the saver. Unlike `Refused` it ends no run: it answers the registration
    that is waited for, if there is one, else it is logged."""

    reason: str


class Ack(_Message, frozen=True):
    seq: int


class Settled(_Message, frozen=True):
    """The end of one step: its slot is free again, and its `Staged` needs no repetition."""

    step: int
    slot: int
    outcome: Literal["committed", "skipped", "failed"]
    reason: str = ""
    path: str = ""
    bytes: int = 0
    write_s: float = 0.0
    commit_s: float = 0.0


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Something that the saver did, in nanoseconds of its monotonic clock."""

    name: str
    start_ns: int
    stop_ns: int


class Traced(_Message, frozen=True):
    """What the saver did for one step, said when it is done with it, so after `Settled`; lost with the saver. Spans
    follow each other, or lie within one that is named before them."""

    step: int
    outcome: Literal["committed", "failed"]
    pid: int
    clock: Clock
    spans: Annotated[list[Span], msgspec.Meta(max_length=MAX_SPANS)]


class Uploaded(_Message, frozen=True):
    """What became of the copy of a committed step to the second tier: `url` is where it is, `reason` why it is not."""

    step: int
    outcome: Literal["uploaded", "failed", "dropped"]
    url: str = ""
    reason: str = ""


class Pong(_Message, frozen=True):
    """`incarnation` differs after a restart of the saver; `known` is False if it holds no run of this rank."""

    incarnation: str
    known: bool


class PromiseWanted(_Message, frozen=True):
    """A rank is to be preempted: answer with a `Promise`, whatever the training is doing."""


class StopAfter(_Message, frozen=True):
    """The agreement: the same number of optimizer steps on every rank. None: there can be none, a rank has left."""

    steps: int | None


class Status(_Message, frozen=True):
    """`report` is the JSON of the saver's `status.SaverStatus`."""

    report: bytes


Word = PromiseWanted | StopAfter | Traced | Uploaded  # what answers nothing
FromSaver = LayoutWanted | Granted | Started | Refused | Rejected | Ack | Settled | Pong | Status | LeadOpen | Word

_encoder = msgspec.msgpack.Encoder()
_from_rank = msgspec.msgpack.Decoder(FromRank)
_from_saver = msgspec.msgpack.Decoder(FromSaver)


def encode(message: FromRank | FromSaver) -> bytes:
    return _encoder.encode(message)


def check_sendable(message: Register) -> None:
    """Raises CheckpointError for what no saver would get to see: text that is none, more than MAX_MESSAGE_BYTES."""
    try:
        size_bytes = len(encode(message))
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{message.options.directory!r} or a name in the model is not valid text: {error}"
        ) from error
    if size_bytes > MAX_MESSAGE_BYTES:
        raise CheckpointError(f"the registration of rank {message.rank} has {size_bytes} bytes, at most "
                              f"{MAX_MESSAGE_BYTES} are allowed (MAX_MESSAGE_BYTES)")  # fmt: skip


def decode_from_rank(payload: bytes | memoryview) -> FromRank:
    """Raises msgspec.DecodeError (or its subclass ValidationError) on anything but a valid message of a rank."""
    message: FromRank = _decode(_from_rank, payload)
    return message


def decode_from_saver(payload: bytes | memoryview) -> FromSaver:
    """Raises msgspec.DecodeError (or its subclass ValidationError) on anything but a valid message of a saver."""
    message: FromSaver = _decode(_from_saver, payload)
    return message


def decode_stored(data: bytes, kind: type[T]) -> T:
    """A struct of ours from a file. Raises msgspec.DecodeError, as above, and nothing else."""
    stored: T = _decode(msgspec.msgpack.Decoder(kind), data)
    return stored


def _decode(decoder: msgspec.msgpack.Decoder[Any], payload: bytes | memoryview) -> Any:
    try:
        return decoder.decode(payload)
    # msgspec lets these through as they are; a policy that is not allowed says so itself.
    except (UnicodeDecodeError, RecursionError, CheckpointError) as error:
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
