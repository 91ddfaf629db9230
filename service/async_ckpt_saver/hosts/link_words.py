"""The words between a relay and the lead: msgpack structs over DEALER-ROUTER pairs, one pair a lane.

Lane 0 is for words, the others for pieces, so that a slow transfer holds up no word. Words with a `seq` are said in
order and repeated until they are heard (`lane.py`); the others say it again by themselves. A piece is its word, then
its bytes in frames of any length (`in_frames`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

import msgspec

from async_ckpt.core.limits import (
    MAX_CLAIMS,
    MAX_DIRECTORY_CHARS,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_NAME_CHARS,
    MAX_RECORD_BYTES,
    MAX_SEQUENCE,
    MAX_SLOTS,
    MAX_STEP,
    MAX_WORLD,
)
from async_ckpt.core.pieces import MAX_PIECES as MAX_FILE_PIECES
from async_ckpt.core.protocol import Layout, Options

LINK_PROTOCOL = 3
MAX_LANES = 17
MAX_PIECES = 1 << 40
MAX_SPANS = MAX_CLAIMS + MAX_FILES
MAX_COPY_PIECE_BYTES = 1 << 20
FRAME_BYTES = 1 << 20  # ZeroMQ encrypts a frame as a whole, in several passes over it

Seq = Annotated[int, msgspec.Meta(ge=0, le=MAX_SEQUENCE)]
_Slot = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SLOTS)]
_Step = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)]
_Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
_Identity = Annotated[bytes, msgspec.Meta(min_length=1, max_length=255)]
_Payload = Annotated[bytes, msgspec.Meta(max_length=MAX_MESSAGE_BYTES)]
_Directory = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_DIRECTORY_CHARS)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Number = Annotated[int, msgspec.Meta(ge=0, lt=MAX_PIECES)]
_Temporary = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class _Word(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    pass


class _Said(_Word, frozen=True, kw_only=True):
    """`seq`: its number on its lane and in its direction, from 1; 0 as long as it has none."""

    seq: Seq = 0


class Hello(_Word, frozen=True):
    """First word on each lane of a session, until `Welcome`. `host` is what `slots.shm_identity` says there, `name` is
    for people. `session` is random: a relay that starts anew has another one. `direct`: it writes its ranks' parts of a
    checkpoint itself, if it is asked to (`--shared-fs direct`)."""

    protocol: int
    session: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    lane: Annotated[int, msgspec.Meta(ge=0, lt=MAX_LANES)]
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    name: Annotated[str, msgspec.Meta(max_length=256)]
    direct: bool = False


class Beat(_Word, frozen=True):
    """Once a second, and whenever words have been heard. On a connection that keeps the order, who hears `sent` has
    heard every word up to it, or never will."""

    sent: Seq
    received: Seq


class Missing(_Word, frozen=True):
    """Words after `received` did not arrive: say them again."""

    received: Seq


class Say(_Said, frozen=True):
    """`payload`: what the rank `identity` says, as in `protocol`."""

    identity: _Identity
    payload: _Payload


class Offer(_Said, frozen=True):
    """Rank `identity` has staged `step` in `slot`. `record` is its `SaveRecord` if it wrote one. Answered by `Wanted`
    or `Held`; by its outcome alone where hosts write their parts themselves."""

    identity: _Identity
    slot: _Slot
    step: _Step
    copy_s: _Seconds
    stall_s: _Seconds
    record: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)] | None


class Piece(_Said, frozen=True):
    """Bytes of a wanted step: piece `number` of what the rank owns (`spans.Pieces`), with their xxh3-64. None where the
    link is encrypted, since CURVE proves each message by a code of its own (Poly1305)."""

    identity: _Identity
    step: _Step
    number: Annotated[int, msgspec.Meta(ge=0, lt=MAX_PIECES)]
    xxh3: Annotated[int, msgspec.Meta(ge=0)] | None


class Left(_Said, frozen=True):
    """The process of rank `identity` is gone, and what it had staged has been handed over. Answered by a `Pong` that
    does not know it."""

    identity: _Identity


class PartWritten(_Said, frozen=True):
    """Answers `WritePart`: all of it is durable. `hashes` are the xxh3-64 of its pieces (`parts.part_of`), in their
    order, 8 bytes each, little-endian."""

    identity: _Identity
    name: _Temporary
    hashes: Annotated[bytes, msgspec.Meta(max_length=8 * MAX_FILE_PIECES)]


class PartFailed(_Said, frozen=True):
    """Answers `WritePart`: why it was not written, and the system's error, 0 if it was none."""

    identity: _Identity
    name: _Temporary
    reason: Annotated[str, msgspec.Meta(max_length=4096)]
    code: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)] = 0


class CopyHeld(_Said, frozen=True):
    """Here is a whole copy, in RAM, of the checkpoint of `step` whose manifest has `digest`. The newest one of each
    directory that the relay serves, whenever a session begins; and the answer to `CopyOffered`."""

    directory: _Directory
    step: _Step
    digest: _Digest


class CopyFailed(_Said, frozen=True):
    """What was offered is not kept: why."""

    digest: _Digest
    reason: Annotated[str, msgspec.Meta(max_length=4096)]


class CopyWanted(_Said, frozen=True):
    """Send piece `number` of the checkpoint (`copies.pieces_of`). Either side asks, and is answered by `CopyPiece` or
    `CopyGone`."""

    digest: _Digest
    number: _Number


class CopyPiece(_Said, frozen=True):
    """On the first lane for pieces, in the order in which they were asked for."""

    digest: _Digest
    number: _Number
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_COPY_PIECE_BYTES)]


class CopyGone(_Said, frozen=True):
    """It is not there, or no longer: its slot was taken by another step."""

    digest: _Digest


Copied: TypeAlias = CopyWanted | CopyPiece | CopyGone
FromRelay: TypeAlias = (
    Hello | Beat | Missing | Say | Offer | Piece | Left | PartWritten | PartFailed | CopyHeld | CopyFailed | Copied
)  # fmt: skip


class Welcome(_Word, frozen=True):
    incarnation: _Name


class Unwelcome(_Word, frozen=True):
    """`Hello` cannot be answered otherwise, whenever it is said."""

    reason: str


class Stranger(_Word, frozen=True):
    """No session is known on this lane: begin a new one."""


class Tell(_Said, frozen=True):
    """`payload`: what the lead says to rank `identity`, as in `protocol`."""

    identity: _Identity
    payload: _Payload


class Opened(_Said, frozen=True):
    """A run of which `Share`s follow, one for each of `ranks`: all that are on the relay's host. `keeps`: this relay is
    to keep copies of what the run commits. `hosts_write`: it is to write its ranks' parts of each checkpoint itself."""

    run: _Name
    job: _Name
    options: Options
    layout: Layout
    versions: Annotated[dict[_Name, _Name], msgspec.Meta(max_length=64)]
    ranks: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=MAX_WORLD)]], msgspec.Meta(max_length=MAX_WORLD)]
    keeps: bool = False
    hosts_write: bool = False


class Share(_Said, frozen=True):
    """In place of `Granted`: what of the run rank `identity` owns; `spans` as `spans.pack` makes them."""

    identity: _Identity
    run: _Name
    rank: Annotated[int, msgspec.Meta(ge=0, lt=MAX_WORLD)]
    owned: Annotated[list[int], msgspec.Meta(max_length=MAX_CLAIMS)]
    replicated: Annotated[list[int], msgspec.Meta(max_length=MAX_CLAIMS)]
    spans: _Payload


class Wanted(_Said, frozen=True):
    """The lead has taken up `step`: send every piece of it."""

    identity: _Identity
    step: _Step


class Held(_Said, frozen=True):
    """All of `step` is in the lead's journal, or its outcome is known: nothing more of it is needed."""

    identity: _Identity
    step: _Step


class WritePart(_Said, frozen=True):
    """Write what the ranks of your host own of `step`, in `slot`, into the files that are there in the directory `name`
    beside the checkpoint to come; make none. `identity` is one of these ranks. Answered by `PartWritten` or
    `PartFailed`; asked again in each new session until one of them was heard."""

    identity: _Identity
    slot: _Slot
    step: _Step
    name: _Temporary


class CopyOffered(_Said, frozen=True):
    """Keep a copy of this committed checkpoint: ask for its pieces. Answered by `CopyHeld` or `CopyFailed`."""

    directory: _Directory
    manifest: Annotated[bytes, msgspec.Meta(max_length=MAX_MANIFEST_BYTES)]


class CopyForgotten(_Said, frozen=True):
    """No copy of a checkpoint in `directory` is needed on this host any more."""

    directory: _Directory


FromLead: TypeAlias = (
    Welcome | Unwelcome | Stranger | Beat | Missing | Tell | Opened | Share | Wanted | Held
    | WritePart | CopyOffered | CopyForgotten | Copied
)  # fmt: skip
OfCopies: TypeAlias = CopyHeld | CopyFailed | CopyOffered | CopyForgotten | Copied
OfParts: TypeAlias = PartWritten | PartFailed | WritePart
Said: TypeAlias = Say | Offer | Piece | Left | Tell | Opened | Share | Wanted | Held | OfParts | OfCopies

_encoder = msgspec.msgpack.Encoder()
_from_relay = msgspec.msgpack.Decoder(FromRelay)
_from_lead = msgspec.msgpack.Decoder(FromLead)


def in_frames(payload: bytes | memoryview) -> Iterator[memoryview]:
    view = memoryview(payload)
    return (view[at : at + FRAME_BYTES] for at in range(0, len(view), FRAME_BYTES))


def encode_word(word: FromRelay | FromLead) -> bytes:
    return _encoder.encode(word)


def decode_from_relay(data: bytes | memoryview) -> FromRelay:
    """Raises msgspec.DecodeError on anything but a valid word of a relay."""
    word: FromRelay = _decode(_from_relay, data)
    return word


def decode_from_lead(data: bytes | memoryview) -> FromLead:
    """Raises msgspec.DecodeError on anything but a valid word of a lead."""
    word: FromLead = _decode(_from_lead, data)
    return word


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes | memoryview) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError:
        raise
    except (ValueError, RecursionError) as error:  # msgspec lets some through as they are; ours say so themselves
        raise msgspec.DecodeError(str(error)) from error
