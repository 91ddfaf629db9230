"""A lead's side of copies in RAM: what it has committed goes to one other host, and when a job comes back, to all.

    committed -> `CopyOffered` to the keeper: the host of the lowest rank that is on another host; the others forget
    a job starts -> the newest checkpoint, from the kept image, a copy here, or a copy there -> offered to every host

What is newest is said by storage alone, by its manifest; RAM is only where its bytes may come from.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Url, location_of
from async_ckpt.core.manifest import MANIFEST_NAME, manifest_bytes
from async_ckpt.core.protocol import Resume
from async_ckpt.core.slots import Peer

from .copies import Source, digest_of, folder_source
from .copy_keeper import CopyKeeper, Way
from .link_words import CopyFailed, CopyForgotten, CopyHeld, CopyOffered
from .shares import host_of

if TYPE_CHECKING:
    from ..live import LiveRun
    from ..services import Services
    from ..writer import CommitJob

log = logging.getLogger(__name__)

_MOST_HELD = 64  # directories that a relay says it has copies of


def keeper_of(peers: Iterable[Peer]) -> str | None:
    """The host that keeps copies for the others, the same for every saver that leads this run."""
    for peer in sorted(peers, key=lambda peer: peer.rank):
        host = host_of(peer.process)
        if host is not None:
            return host
    return None


class Spreading:
    def __init__(self, services: Services, keeper: CopyKeeper) -> None:
        self._services, self._keeper = services, keeper
        self._held: dict[Way, dict[str, CopyHeld]] = {}
        self._asked: dict[tuple[Way, bytes], asyncio.Future[bool]] = {}

    # --- from relays -------------------------------------------------------------------------------------------------

    def answered(self, way: Way, word: CopyHeld | CopyFailed) -> None:
        kept = isinstance(word, CopyHeld)
        if isinstance(word, CopyHeld):
            held = self._held.setdefault(way, {})
            if word.directory in held or len(held) < _MOST_HELD:
                held[word.directory] = word
        else:
            log.warning("another host keeps no copy in RAM: %s", word.reason)
        asked = self._asked.pop((way, word.digest), None)
        if asked is not None and not asked.done():
            asked.set_result(kept)

    def lost(self, way: Way) -> None:
        """Its session is over."""
        self._held.pop(way, None)

    def copied_step(self, way: Way) -> int | None:
        """The newest step that the host at the other end is known to keep."""
        return max((word.step for word in self._held.get(way, {}).values()), default=None)

    # --- of runs -----------------------------------------------------------------------------------------------------

    def committed(self, run: LiveRun, slot: int, job: CommitJob, path: str) -> None:
        """`path` is durable, and `slot` holds it until ranks take it again."""
        if run.image.record.options.replicas and keeper_of(run.image.record.peers) is not None:
            self._services.spawn(self._protect(run, slot, job, path))
        else:
            self._unprotect(run)  # the job before it may have had copies

    async def _protect(self, run: LiveRun, slot: int, job: CommitJob, path: str) -> None:
        directory, state, step = run.image.directory, run.image.states[slot], job.step
        manifest = await self._manifest(run, path)
        if manifest is None:
            return
        source = Source(manifest, Path(job.image), job.documents, lambda: state.complete_step() == step)
        self._keeper.forget(directory)  # what the ranks have come back from
        self._keeper.serve(directory, source)
        keeper = keeper_of(run.image.record.peers)
        for host, way in self._ways(run).items():
            if host == keeper:
                way.say(CopyOffered(directory=directory, manifest=manifest))
            else:
                self._forget(way, directory)

    def bound(self, run: LiveRun, host: str, way: Way) -> None:
        """A relay of `run` has a new session: what was offered in the last one may be lost."""
        directory = run.image.directory
        source = self._keeper.served(directory)
        if not run.started or source is None or host != keeper_of(run.image.record.peers):
            return
        held = self._held.get(way, {}).get(directory)
        if run.image.record.options.replicas and (held is None or held.digest != source.digest):
            way.say(CopyOffered(directory=directory, manifest=source.manifest))

    def ended(self, run: LiveRun) -> None:
        """`clean`: nobody will come back for a copy."""
        if run.image.record.options.replicas and run.clean:
            for way in self._ways(run).values():
                way.say(CopyForgotten(directory=run.image.directory))  # also of one that is just being made
            self._unprotect(run)
            self._keeper.serve(run.image.directory, None)

    async def gather(self, run: LiveRun, resume: Resume) -> Resume:
        """Before the ranks start: bring `resume` into RAM here and on the other hosts, if any host has it there. What
        does not come in time is read from storage."""
        options, directory = run.image.record.options, run.image.directory
        until_s = self._services.loop.time() + options.timeout_s / 2
        manifest = await self._manifest(run, resume.path)
        if manifest is None:
            return resume
        source = await self._here(directory, digest_of(manifest), resume.image)
        for way in self._ways(run).values() if source is None else ():
            held = self._held.get(way, {}).get(directory)
            if held is not None and held.digest == digest_of(manifest):
                source = await self._fetch(way, directory, manifest, until_s)
                if source is not None:
                    break
        if source is None:
            return resume
        self._keeper.serve(directory, source)
        await self._spread(run, source, until_s)
        return msgspec.structs.replace(resume, image=str(source.folder), digest=source.digest.hex())

    async def _here(self, directory: str, digest: bytes, image: str | None) -> Source | None:
        if image is not None:
            try:
                source = folder_source(Path(image))
                if source.digest == digest:
                    return source
            except CheckpointError as error:
                log.debug("%s is no whole checkpoint: %s", image, error)
        copy = await self._keeper.sound(directory, digest)
        return None if copy is None else copy.source()

    async def _fetch(self, way: Way, directory: str, manifest: bytes, until_s: float) -> Source | None:
        try:
            patience_s = max(0.0, until_s - self._services.loop.time())
            return (await self._keeper.pull(way, directory, manifest, patience_s)).source()
        except CheckpointError as error:
            log.warning("the copy in RAM on another host cannot be had: %s", error)
        return None

    async def _spread(self, run: LiveRun, source: Source, until_s: float) -> None:
        directory = run.image.directory
        ways = list(self._ways(run).values())
        asked = []
        for way in ways:
            future = self._asked[way, source.digest] = self._services.loop.create_future()
            asked.append(future)
            way.say(CopyOffered(directory=directory, manifest=source.manifest))
        if not asked:
            return
        done, late = await asyncio.wait(asked, timeout=max(0.0, until_s - self._services.loop.time()))
        for way in ways:
            self._asked.pop((way, source.digest), None)
        for future in late:
            future.cancel()
        kept = sum(future.result() for future in done)
        log.info("the newest checkpoint of %s lies in RAM here and on %d of %d other hosts", directory, kept, len(ways))

    async def _manifest(self, run: LiveRun, path: str) -> bytes | None:
        place, options = location_of(path), run.image.record.options
        try:
            storage = self._services.storage(options.directory)
            if isinstance(place, Url) and not storage.far:
                storage = self._services.storage(options.upload_to)
            return await self._services.in_thread(lambda: manifest_bytes(place / MANIFEST_NAME), storage)
        except (OSError, CheckpointError) as error:
            log.warning("the manifest of %s cannot be read, so no copy of it is kept in RAM: %s", path, error)
            return None

    def _unprotect(self, run: LiveRun) -> None:
        directory = run.image.directory
        self._keeper.forget(directory)
        for way in self._ways(run).values() if self._held else ():
            if directory in self._held.get(way, {}):
                self._forget(way, directory)

    def _forget(self, way: Way, directory: str) -> None:
        self._held.get(way, {}).pop(directory, None)
        way.say(CopyForgotten(directory=directory))

    def _ways(self, run: LiveRun) -> dict[str, Way]:
        """To the relays of this run, by host, in the order of ranks."""
        found: dict[str, Way] = {}
        for peer in run.image.record.peers:
            host = host_of(peer.process)
            way = self._services.way_of(peer.identity) if host is not None else None
            if host is not None and way is not None:
                found[host] = way
        return found
