"""A lead without sockets, and words for it: what the fuzzer of links starts from and what it calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import xxhash

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.protocol import (
    Bye,
    Claim,
    FromRank,
    FromSaver,
    Granted,
    Ping,
    Ready,
    Register,
    SaveRecord,
    Skipped,
    decode_from_saver,
    encode,
)
from async_ckpt.core.region import Region
from async_ckpt.core.slots import Phase, SlotPaths, StateFile
from async_ckpt_saver.hosts.lane import Payload
from async_ckpt_saver.hosts.link_words import (
    LINK_PROTOCOL,
    Beat,
    CopyFailed,
    CopyGone,
    CopyHeld,
    CopyPiece,
    CopyWanted,
    FromLead,
    FromRelay,
    Hello,
    Left,
    Missing,
    Offer,
    PartFailed,
    PartWritten,
    Piece,
    Said,
    Say,
    decode_from_lead,
    encode_word,
)
from async_ckpt_saver.hosts.reception import Reception
from async_ckpt_saver.hosts.sessions import Session, Sessions
from tests.fuzz.messages import FuzzedSaver
from tests.saver.saver_process import FILE, LAYOUT, register

NEAR, FAR = b"near", b"far"  # rank 0, at the lead, and rank 1, behind a relay
HALF_BYTES = (FILE.total_bytes - len(FILE.header)) // 2


class FuzzedLead(FuzzedSaver):
    """`told` is what went out on links, decoded."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.told: list[FromLead] = []
        self._ready = False  # rank 0
        self.reception = Reception(self.services, self.hub)
        self.sessions = Sessions(
            "fuzz",
            self.services.now_s,
            self.services.rejections,
            self._send_word,
            self._on_word,
            encrypted=False,
        )
        self.services.way_of = self.reception.way_of

    def _send(self, identity: bytes, message: FromSaver) -> None:
        if not self.reception.tell(identity, message):
            super()._send(identity, message)

    def _send_word(self, routing: bytes, word: bytes, payload: Payload | None) -> None:
        assert payload is None
        said = decode_from_lead(word)
        if not isinstance(said, Said) or said not in self.told:  # it may have been asked to say it again
            self.told.append(said)

    def _on_word(self, session: Session, word: Said, payload: Sequence[memoryview]) -> None:
        self.reception.word(self.sessions, session, word, payload)

    def hear(self, routing: bytes, word: bytes, payload: bytes | None = None) -> None:
        frames = [] if payload is None else [memoryview(payload)[:1], memoryview(payload)[1:]]
        self.sessions.hear(routing, word, frames)
        self.sessions.settle_up()

    def settle(self, seconds: float = 0.0) -> None:
        super().settle(seconds)
        if not self._ready and any(isinstance(answer, Granted) for answer in self.answers):
            self._ready = True
            self.receive(NEAR, encode(Ready()))
        self.reception.tick([self.sessions])

    def heard_by_ranks(self) -> list[FromSaver]:
        """What the relay was told to tell."""
        return [decode_from_saver(word.payload) for word in self.told if hasattr(word, "payload")]


def half(directory: Path, rank: int) -> Register:
    """One of two ranks, each with half of the one tensor."""
    message = register(directory)
    return msgspec.structs.replace(
        message,
        rank=rank,
        options=msgspec.structs.replace(message.options, world=2, replicas=1),
        layout=LAYOUT if rank == 0 else None,
        claims=pack_claims([FILE], [Claim(0, 0, Region(False, (rank * 4,), (4,)))])[0],
    )


def words(directory: Path, content: bytes = bytes(HALF_BYTES)) -> Iterator[tuple[FromRelay, bytes | None]]:
    """The life of rank 1: all kinds of words, each numbered as on its lane; pieces are on another one."""

    def said(message: FromRank) -> tuple[FromRelay, None]:
        return Say(identity=FAR, payload=encode(message)), None

    yield Hello(protocol=LINK_PROTOCOL, session=bytes(16), lane=0, host="boot:1", name="b"), None
    yield Hello(protocol=LINK_PROTOCOL, session=bytes(16), lane=1, host="boot:1", name="b"), None
    yield said(half(directory, 1))
    yield said(Ready())
    record = msgspec.msgpack.encode(SaveRecord(1, {}, None, {"rank-1.json": b"{}"}))
    yield Offer(identity=FAR, slot=0, step=1, copy_s=0.5, stall_s=0.25, record=record), None
    yield Piece(identity=FAR, step=1, number=0, xxh3=xxhash.xxh3_64_intdigest(content)), content
    yield Beat(sent=3, received=0), None
    yield Missing(received=0), None
    yield said(Ping(unsettled=[1, 2]))
    yield CopyHeld(directory=str(directory), step=0, digest=bytes(16)), None
    yield CopyWanted(digest=bytes(16), number=0), None
    yield CopyPiece(digest=bytes(16), number=0, data=b"unasked"), None
    yield CopyGone(digest=bytes(16)), None
    yield CopyFailed(digest=bytes(16), reason="no room"), None
    yield PartWritten(identity=FAR, name=".checkpoint-1.abc.tmp", hashes=bytes(8)), None
    yield PartFailed(identity=FAR, name=".checkpoint-1.abc.tmp", reason="no space", code=28), None
    yield said(Skipped(seq=2, slot=1, step=2, reason="busy"))
    yield said(Bye(seq=3))
    yield Left(identity=FAR), None


def numbered(life: Iterator[tuple[FromRelay, bytes | None]]) -> Iterator[tuple[int, bytes, bytes | None]]:
    """Lane, word, payload."""
    sequences = [0, 0]
    for word, payload in life:
        lane = int(isinstance(word, Piece) or (isinstance(word, Hello) and word.lane == 1))
        if isinstance(word, Said):
            sequences[lane] += 1
            word = msgspec.structs.replace(word, seq=sequences[lane])
        yield lane, encode_word(word), payload


def near_stages(lead: FuzzedLead, step: int) -> None:
    """Rank 0 does its part, once it was granted."""
    granted = next((answer for answer in lead.answers if isinstance(answer, Granted)), None)
    if granted is None or not Path(granted.run).exists():
        return
    paths = SlotPaths(Path(granted.run), 0)
    paths.write_record(0, SaveRecord(step, {}, None, {}))
    state = StateFile(paths.state)
    state.mark(0, Phase.STAGED, step)
    state.close()


def joined(frames: Iterator[tuple[int, bytes, bytes | None]]) -> bytes:
    """A conversation as one input: for each word its lane (1 byte) and two lengths (3 bytes; 0xffffff: no payload)."""
    data = b""
    for lane, word, payload in frames:
        length = 0xFFFFFF if payload is None else len(payload)
        data += bytes([lane]) + len(word).to_bytes(3, "little") + length.to_bytes(3, "little") + word + (payload or b"")
    return data


def split(data: bytes) -> Iterator[tuple[int, bytes, bytes | None]]:
    while len(data) >= 7:
        length, more = int.from_bytes(data[1:4], "little"), int.from_bytes(data[4:7], "little")
        lane, word = data[0] % 3, data[7 : 7 + length]
        data = data[7 + length :]
        if more == 0xFFFFFF:
            yield lane, word, None
        else:
            yield lane, word, data[:more]
            data = data[more:]
