"""A rank on another host, as the lead has it: its bytes come over a link, and its cells are written here.

The order is a rank's own: WRITING, then bytes, then STAGED. Where hosts write their parts themselves no bytes come, and
STAGED says that its host has them, in a slot that is kept until the outcome. So for all that comes after (what is
complete, the commit, a lead that was killed and follows its journal) it is a rank like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import xxhash

from async_ckpt.core.protocol import Failed, SaveRecord, Staged, decode_stored
from async_ckpt.core.slots import Phase

from ..live import LiveRun
from .incoming import Incoming
from .link_words import Offer, Piece
from .mapped import MappedImages
from .shares import read_share
from .spans import Pieces


class SenselessError(ValueError):
    """A word that no relay of this run can have meant: it changes nothing."""


class RemoteRank:
    """Rank `rank` of `run`. Raises CheckpointError if its share cannot be read."""

    def __init__(self, run: LiveRun, rank: int) -> None:
        self.run, self.rank = run, rank
        image = run.image
        self._spans = read_share(image.path, rank, image.sizes_bytes())
        self._pieces = Pieces(self._spans)
        self._incoming = Incoming(self._pieces.count)
        self._mapped = MappedImages(image, writable=True)

    @property
    def writes_itself(self) -> bool:
        """Its host does."""
        return self.run.image.record.hosts_write

    def prepare(self) -> None:
        """Takes time; for a thread. What is written first is then written as fast as what comes later."""
        self._mapped.populate(self._spans)

    def offer(self, word: Offer) -> bool:
        """Whether the step is held already, or wanted no more; else all its pieces are to come, or, if its host writes
        them, none. Raises SenselessError, CheckpointError."""
        image = self.run.image
        if not self.run.started:
            raise SenselessError(f"step {word.step} before the run has started")
        if word.slot >= len(image.slots):
            raise SenselessError(f"slot {word.slot} of {len(image.slots)}")
        state = image.states[word.slot]
        cell = state.cell(self.rank)
        staged = cell.phase is Phase.STAGED and cell.step == word.step
        settled = self.run.outcome(word.step) is not None or word.step <= state.settled_step
        if staged or settled:
            self._report(word)
            return settled or not self.writes_itself
        if cell.step > word.step:
            raise SenselessError(f"step {word.step} for slot {word.slot}, which holds step {cell.step} already")
        if word.record is not None:
            self._check_record(word)
        state.mark(self.rank, Phase.WRITING, word.step)
        if word.record is not None:
            image.slots[word.slot].write_record(self.rank, decode_stored(word.record, SaveRecord))
        self._incoming.begin(word)
        if self.writes_itself:
            self._staged(word)
            return False
        return self._finish()

    def piece(self, word: Piece, payload: Sequence[memoryview], *, proved: bool) -> bool:
        """Whether the step is complete with it. One that is not expected any more is passed over. `proved`: the link
        has seen to it that these are the bytes that were sent. Raises SenselessError."""
        if not 0 <= word.number < self._pieces.count:
            raise SenselessError(f"piece {word.number} of {self._pieces.count}")
        offer = self._incoming.offer
        if self.writes_itself:
            raise SenselessError(f"piece {word.number} of a step that its host writes itself")
        if offer is None or not self._incoming.expects(word.step, word.number):
            return False
        if self.run.outcome(word.step) is not None:  # its slot may hold another step by now, at the relay
            self._incoming.end()
            return False
        came_bytes = sum(frame.nbytes for frame in payload)
        if came_bytes != self._pieces.size_bytes(word.number):
            raise SenselessError(f"piece {word.number} of {came_bytes} bytes, not "
                                 f"{self._pieces.size_bytes(word.number)}")  # fmt: skip
        if word.xxh3 is None and not proved:
            raise SenselessError(f"piece {word.number} without a hash, on a link without CURVE")
        if word.xxh3 is not None and _hash(payload) != word.xxh3:
            self.fail(f"piece {word.number} of rank {self.rank} was damaged on its way: is the network sound?")
            raise SenselessError(f"piece {word.number} of step {word.step} does not hash as said")
        self._write(offer.slot, word.number, payload)
        self._incoming.took(word.number)
        return self._finish()

    def fail(self, reason: str) -> None:
        """The step that is being handed over cannot be completed."""
        offer = self._incoming.offer
        if offer is not None:
            self._incoming.end()
            self.run.receive(self.rank, Failed(seq=0, slot=offer.slot, step=offer.step, reason=reason))

    def close(self) -> None:
        self._mapped.close()

    def _check_record(self, word: Offer) -> None:
        try:
            record = decode_stored(word.record or b"", SaveRecord)
        except msgspec.DecodeError as error:
            raise SenselessError(f"the record of step {word.step} cannot be read: {error}") from error
        if record.step != word.step:
            raise SenselessError(f"the record of step {record.step} for step {word.step}")

    def _finish(self) -> bool:
        offer = self._incoming.complete
        if offer is None:
            return False
        self._staged(offer)
        return True

    def _staged(self, offer: Offer) -> None:
        self._incoming.end()
        self.run.image.states[offer.slot].mark(self.rank, Phase.STAGED, offer.step, offer.copy_s)
        self._report(offer)

    def _report(self, offer: Offer) -> None:
        staged = Staged(seq=0, slot=offer.slot, step=offer.step, copy_s=offer.copy_s, stall_s=offer.stall_s)
        self.run.receive(self.rank, staged)

    def _write(self, slot: int, number: int, payload: Sequence[memoryview]) -> None:
        """Raises OSError: then the run is no longer in shared memory."""
        spans = iter(self._pieces.cut(number))
        room = memoryview(b"")
        for frame in payload:
            while frame.nbytes:
                if not room.nbytes:
                    span = next(spans)
                    room = self._mapped.view(slot, span.file)[span.start : span.stop]
                count = min(frame.nbytes, room.nbytes)
                room[:count] = frame[:count]
                frame, room = frame[count:], room[count:]


def _hash(payload: Sequence[memoryview]) -> int:
    hasher = xxhash.xxh3_64()
    for frame in payload:
        hasher.update(frame)
    return hasher.intdigest()
