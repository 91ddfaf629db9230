"""A relay's side of checkpoints that every host writes itself: what its ranks have staged goes from the slot into files
that the lead has made, below this saver's own root, and no other file is touched or made."""

from __future__ import annotations

import logging
import socket
import sys
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.slots import Phase

from ..image import RunImage
from ..local_storage import LocalStorage
from ..partfile import PartFile, mapped_source, write_pieces
from ..services import Services
from ..temporaries import is_temporary
from .dialler import Link
from .link_words import PartFailed, PartWritten, WritePart
from .part_answers import Asked
from .parts import part_of
from .spans import Span

log = logging.getLogger(__name__)

_REASON_CHARS = 4096


class _GivenUp(CheckpointError):
    """Nobody waits for it any more."""


class PartWriter:
    """Of one run; `shares` are those of its ranks here."""

    def __init__(self, services: Services, image: RunImage, link: Link, shares: Mapping[int, Sequence[Span]]) -> None:
        self._services, self._image, self._link, self._shares = services, image, link, shares
        self._asked = Asked()

    def word(self, word: WritePart) -> None:
        todo = self._asked.ask(word)
        if todo == "write":
            self._services.spawn(self._write(word))
        elif todo != "writing":
            self._link.say(todo)

    def over(self, step: int | None = None) -> None:
        """It has its outcome; None: nothing is needed of this run any more."""
        self._asked.over(step)

    async def _write(self, word: WritePart) -> None:
        answer: PartWritten | PartFailed
        try:
            storage = self._services.storage(self._image.directory)
            if not isinstance(storage, LocalStorage):
                raise CheckpointError(f"{storage.directory} is no directory")
            hashes = await self._services.in_thread(partial(self._into, storage, word), storage)
            answer = PartWritten(identity=word.identity, name=word.name, hashes=hashes)
            log.info("step %d of %s: the part of this host is written", word.step, self._image.directory)
        except Exception as error:  # whatever it is, the lead has to hear of it, or it would wait
            known = isinstance(error, (OSError, CheckpointError))
            if not known:
                log.exception("the part of step %d was not written", word.step)
            code = error.errno if isinstance(error, OSError) and error.errno is not None else 0
            reason = (str(error) if known else repr(error))[:_REASON_CHARS]
            answer = PartFailed(identity=word.identity, name=word.name, reason=reason, code=code)
            log.log(logging.INFO if isinstance(error, _GivenUp) else logging.ERROR, "step %d of %s: %s", word.step,
                    self._image.directory, reason)  # fmt: skip
        if self._asked.done(answer):
            self._link.say(answer)

    # --- in a thread -------------------------------------------------------------------------------------------------

    def _into(self, storage: LocalStorage, word: WritePart) -> bytes:
        """The hashes of the pieces. Raises OSError, CheckpointError."""
        if not is_temporary(word.name, word.step):
            raise CheckpointError(f"{word.name!r} is no hidden directory of step {word.step}")
        self._check_whole(word)
        files = self._image.record.files
        mine: dict[int, list[Span]] = defaultdict(list)
        for piece in part_of(self._shares.values()):
            mine[piece.file].append(piece)
        hashes = array("Q")
        with storage.part_of_commit(word.name) as folder, ThreadPoolExecutor(1, thread_name_prefix="hash") as hashing:
            for number, pieces in mine.items():
                image = str(self._image.slots[word.slot].image)
                with (
                    mapped_source(image, files[number]) as source,
                    PartFile(folder, files[number], len(source)) as file,
                ):
                    before = partial(self._before_piece, word)
                    places = [(piece.start, piece.stop) for piece in pieces]
                    hashes.extend(write_pieces(source, file, places, hashing, before))
                    file.sync()
        self._check_whole(word)  # a rank says so in its cell before it changes the first byte
        if sys.byteorder != "little":
            hashes.byteswap()
        return hashes.tobytes()

    def _before_piece(self, word: WritePart) -> None:
        if not self._asked.current(word.name):
            raise _GivenUp(f"the attempt {word.name} was given up")

    def _check_whole(self, word: WritePart) -> None:
        """Raises CheckpointError unless all that this host has of the step is in its slot."""
        if word.slot >= len(self._image.states):
            raise CheckpointError(f"{socket.gethostname()} has no slot {word.slot} of this run")
        for peer in self._image.record.peers:
            cell = self._image.states[word.slot].cell(peer.rank)
            if cell.phase is not Phase.STAGED or cell.step != word.step:
                raise CheckpointError(f"in slot {word.slot} rank {peer.rank} has step {cell.step} ({cell.phase.name}), "
                                      f"not step {word.step}")  # fmt: skip
