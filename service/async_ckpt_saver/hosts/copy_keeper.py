"""The copies that a saver keeps of what other hosts' savers have committed: of each directory the newest that came.

A copy is pulled: who wants it asks for a few pieces at a time, so it takes no more than it can, and whoever has it, in
a slot or as a copy of its own, answers as long as it is there. An older copy stands until a newer one is whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from async_ckpt.core.errors import CheckpointError

from .copies import Copy, Copying, Source, digest_of, find_copies
from .link_words import (
    Copied,
    CopyFailed,
    CopyForgotten,
    CopyGone,
    CopyHeld,
    CopyOffered,
    CopyPiece,
    CopyWanted,
    OfCopies,
    Said,
)

if TYPE_CHECKING:
    from ..services import Services

log = logging.getLogger(__name__)

WINDOW = 6  # pieces on their way; with as many unheard ones a lane has room


class Way(Protocol):
    """To the saver of another host, equal to itself as long as the session lasts. What is said while there is none is
    lost. `name` is that of the host, for people."""

    @property
    def name(self) -> str: ...

    def say(self, word: Said) -> None: ...

    def hand(self, word: CopyPiece) -> bool:
        """False, and it is not sent, if there is no room on the first lane for pieces."""


class _Pull:
    def __init__(self, way: Way, directory: str, done: asyncio.Future[None], now_s: float) -> None:
        self.way, self.directory, self.done, self.heard_s = way, directory, done, now_s
        self.copying: Copying | None = None

    def fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(CheckpointError(reason))

    def end(self) -> None:
        """Nobody waits any more; a failure has been heard, or is not of interest."""
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()

    def look(self) -> None:
        """Ask for what may be asked for; done when all of it is here."""
        if self.copying is None:
            return
        while (number := self.copying.next_number(WINDOW)) is not None:
            self.way.say(CopyWanted(digest=self.copying.record.digest, number=number))
        if self.copying.complete and not self.done.done():
            self.done.set_result(None)


class CopyKeeper:
    """`pulled_bytes` have come from other hosts, `pulls` are the copies that came whole, `refused` those that were not
    what their manifest says."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._kept: dict[str, tuple[Copy, float]] = {}  # by directory, and until when it was certainly needed
        self._pulls: dict[bytes, _Pull] = {}
        self._next: dict[str, tuple[Way, CopyOffered]] = {}
        self._sources: dict[str, Source] = {}
        self._closed = False
        self.pulled_bytes = self.pulls = self.refused = 0

    @property
    def quiet(self) -> bool:
        return not self._kept and not self._pulls

    def adopt(self) -> None:
        """Keep what an earlier saver kept: the newest of each directory."""
        try:
            found = find_copies(self._services.endpoint)
        except (OSError, CheckpointError) as error:
            log.error("copies of other hosts' checkpoints cannot be looked for: %s", error)
            return
        for copy in sorted(found, key=lambda copy: copy.record.step):
            self._keep(copy)

    def tick(self, serving: Collection[str]) -> None:
        """`serving`: directories that have ranks. The copies of the others are kept for a job that comes back."""
        now_s = self._services.now_s()
        for directory, (copy, needed_s) in list(self._kept.items()):
            if directory in serving:
                self._kept[directory] = copy, now_s
            elif now_s - needed_s > self._services.keep_image_s:
                log.info("nobody has come back for the copy of step %d of %s", copy.record.step, directory)
                self.forget(directory)
        for pull in self._pulls.values():
            if now_s - pull.heard_s > self._services.lease_s:
                pull.fail(f"nothing of it has come for {self._services.lease_s:g} s")
        self._sources = {directory: source for directory, source in self._sources.items() if source.there}

    def close(self) -> None:
        """What is whole stays in shared memory, for the saver after this one."""
        self._closed = True
        for pull in self._pulls.values():
            pull.fail("this saver ends")

    # --- what is here ------------------------------------------------------------------------------------------------

    def find(self, directory: str, digest: bytes) -> Copy | None:
        copy = self.held(directory)
        return copy if copy is not None and copy.record.digest == digest else None

    def held(self, directory: str) -> Copy | None:
        kept = self._kept.get(directory)
        return None if kept is None else kept[0]

    def image_of(self, directory: str, digest: str) -> str | None:
        """Where the copy is whose digest is given in hex, if it is here."""
        copy = self.held(directory)
        return str(copy.checkpoint) if copy is not None and copy.record.digest.hex() == digest else None

    def forget(self, directory: str) -> None:
        """No copy of it is needed here."""
        self._next.pop(directory, None)
        for pull in self._pulls.values():
            if pull.directory == directory:
                pull.fail("it is needed no more")
        kept = self._kept.pop(directory, None)
        if kept is not None:
            self._services.spawn(self._services.in_thread(kept[0].remove))

    def serve(self, directory: str, source: Source | None) -> None:
        """From now on this is what there is of `directory`, besides copies."""
        if source is None:
            self._sources.pop(directory, None)
        else:
            self._sources[directory] = source

    def served(self, directory: str) -> Source | None:
        return self._sources.get(directory)

    def _keep(self, copy: Copy) -> None:
        earlier = self.held(copy.record.directory)
        self._kept[copy.record.directory] = copy, self._services.now_s()
        if earlier is not None:
            self._services.spawn(self._services.in_thread(earlier.remove))

    # --- what others have --------------------------------------------------------------------------------------------

    async def pull(self, way: Way, directory: str, manifest: bytes, patience_s: float | None = None) -> Copy:
        """Make a copy of what is at the other end of `way`, and keep it in place of an earlier one. Raises
        CheckpointError if it does not come whole, or not within `patience_s`; then nothing of it is left."""
        services, digest = self._services, digest_of(manifest)
        if digest in self._pulls or self._closed:
            raise CheckpointError("it is being copied already" if not self._closed else "this saver ends")
        pull = self._pulls[digest] = _Pull(way, directory, services.loop.create_future(), services.now_s())
        if patience_s is not None:
            services.loop.call_later(patience_s, pull.fail, f"it has not come within {patience_s:.0f} s")
        try:
            pull.copying = await services.in_thread(lambda: Copying.begin(services.endpoint, directory, manifest))
            pull.heard_s = services.now_s()
            pull.look()
            await pull.done
            copy = self._finish(pull.copying)
        except BaseException:
            if pull.copying is not None:
                pull.copying.abandon()
            raise
        finally:
            del self._pulls[digest]
            pull.end()
        self._keep(copy)
        self.pulls += 1
        log.info("a copy of step %d of %s is kept here", copy.record.step, directory)
        return copy

    def _finish(self, copying: Copying) -> Copy:
        try:
            return copying.finish()
        except CheckpointError as error:
            self.refused += 1
            self._services.rejections.count("unexpected", str(error))
            raise
        except OSError as error:
            raise CheckpointError(f"it cannot be written: {error}") from error

    def word(self, way: Way, word: Copied) -> None:
        if isinstance(word, CopyWanted):
            self._answer(way, word)
            return
        pull = self._pulls.get(word.digest)
        if pull is None or pull.way != way or pull.copying is None:
            return  # it is needed no more
        if isinstance(word, CopyGone):
            pull.fail("it is not there any more: its slot was taken by another step, or its saver was replaced")
            return
        try:
            if pull.copying.take(word.number, word.data):
                pull.heard_s = self._services.now_s()
                self.pulled_bytes += len(word.data)
        except OSError as error:
            pull.fail(f"it cannot be written: {error}")
        pull.look()

    def _answer(self, way: Way, word: CopyWanted) -> None:
        data = None
        try:
            source = self._source(word.digest)
            data = source.read(word.number) if source is not None else None
        except IndexError as error:
            self._services.rejections.count("unexpected", f"a piece of a copy that there is none of: {error}")
        except CheckpointError as error:
            log.warning("a copy cannot be read: %s", error)
        if data is None:
            way.say(CopyGone(digest=word.digest))
        elif not way.hand(CopyPiece(digest=word.digest, number=word.number, data=data)):
            self._services.rejections.count("limit", "more pieces of copies were asked for than are taken")

    def _source(self, digest: bytes) -> Source | None:
        for source in self._sources.values():
            if source.digest == digest:
                return source
        for copy, _ in self._kept.values():
            if copy.record.digest == digest:
                source = copy.source()
                self._sources[copy.record.directory] = source
                return source
        return None

    # --- of a relay --------------------------------------------------------------------------------------------------

    def session_began(self, way: Way, directory: str) -> None:
        """Say what is here, and ask again for what was on its way."""
        copy = self.held(directory)
        if copy is not None:
            way.say(CopyHeld(directory=directory, step=copy.record.step, digest=copy.record.digest))
        for pull in self._pulls.values():
            if pull.way == way and pull.copying is not None:
                pull.copying.ask_again()
                pull.look()

    def lead_word(self, way: Way, directory: str, word: OfCopies) -> None:
        """Said by the lead of `directory`, which speaks for no other one."""
        if isinstance(word, CopyOffered):
            if word.directory == directory:
                self.offered(way, word)
        elif isinstance(word, CopyForgotten):
            if word.directory == directory:
                self.forget(directory)
        elif isinstance(word, Copied):
            self.word(way, word)

    def offered(self, way: Way, word: CopyOffered) -> None:
        """The lead wants a copy of it to be kept here. One at a time: of what is offered meanwhile the last counts."""
        if self._closed or digest_of(word.manifest) in self._pulls:
            return
        under_way = [pull for pull in self._pulls.values() if pull.directory == word.directory]
        if not under_way:
            self._services.spawn(self._take(way, word))
            return
        self._next[word.directory] = way, word
        for pull in under_way:
            if pull.way != way:
                pull.fail("another saver leads the job now")

    async def _take(self, way: Way, word: CopyOffered) -> None:
        digest = digest_of(word.manifest)
        try:
            copy = await self.sound(word.directory, digest) or await self.pull(way, word.directory, word.manifest)
        except CheckpointError as error:
            log.warning("no copy of what was committed to %s is kept: %s", word.directory, error)
            way.say(CopyFailed(digest=digest, reason=str(error)[:4096]))
        else:
            way.say(CopyHeld(directory=word.directory, step=copy.record.step, digest=digest))
        following = self._next.pop(word.directory, None)
        if following is not None:
            self.offered(*following)

    async def sound(self, directory: str, digest: bytes) -> Copy | None:
        """The copy of it that is here, every byte of it hashed anew; one that is damaged is dropped."""
        copy = self.find(directory, digest)
        if copy is None:
            return None
        damage = await self._services.in_thread(copy.damage)
        if not damage:
            return copy
        self.refused += 1
        log.error("the copy of step %d of %s is damaged, and is dropped: %s", copy.record.step, directory, damage)
        if self.held(directory) is copy:
            self.forget(directory)
        return None
