"""Copies committed checkpoints from the first tier, a directory, to the second one, behind the commits.

The bytes come from the directory, not from shared memory: slots are free at once, and what a killed saver had not
uploaded, the next one finds by comparing the manifests of both tiers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from pathlib import Path

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.holding import reading
from async_ckpt.core.limits import MAX_REASON_CHARS
from async_ckpt.core.location import Location, location_of
from async_ckpt.core.manifest import (
    MANIFEST_NAME,
    Manifest,
    checkpoint_name,
    decode_manifest,
    manifest_bytes,
    manifests,
)
from async_ckpt.core.protocol import Options, Uploaded
from async_ckpt.core.retention_policy import Policy

from .retention import expired, kept_by, metrics_of
from .services import Services
from .status import wall_clock_s
from .upload_status import UploadChronicle, UploadStatus
from .uploads import Ended, Uploads
from .writer import CommitJob, CommitResult

log = logging.getLogger(__name__)


class _Gone(CheckpointError):
    """It is not in the first tier any more."""


class Uploader:
    """From `directory` to `url`, one checkpoint at a time; every method is called in the saver's loop.

    An upload that fails is tried again when the next checkpoint is committed, and when the next run begins. `tell` is
    given what became of each; `on_rest` comes when there is no more to do for now.
    """

    def __init__(
        self,
        services: Services,
        directory: str,
        url: str,
        tell: Callable[[Uploaded], None],
        on_rest: Callable[[], None],
    ) -> None:
        self.url = url
        self._services = services
        self._directory = directory
        self._first = services.storage(directory)
        self._second = services.storage(url)
        self._place: Location = location_of(url)
        self._tell, self._on_rest = tell, on_rest
        self._queue = Uploads()
        self._chronicle = UploadChronicle(services.loop.time, wall_clock_s, lambda upload: services.on_uploaded(upload))
        self._policy = Policy()
        self._timeout_s = 600.0
        self._comparing = False  # what both tiers hold has to be compared
        self._compared = False
        self._incomparable = False  # the last try failed: again after the next commit
        self._retaining = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def idle(self) -> bool:
        return self._task is None or self._task.done()

    @property
    def failing(self) -> bool:
        """The second tier lacks what it should have, or nobody knows."""
        return self._incomparable or self._queue.has_failed

    def serve(self, options: Options) -> None:
        """A run with these options begins, or is gone on with: queue what an earlier one did not upload."""
        self._policy, self._timeout_s = options.policy, options.timeout_s
        self._comparing = True
        self._wake()

    def add(self, step: int) -> None:
        """`step` was committed to the first tier."""
        self._queue.add(step)
        self._chronicle.committed(step)
        self._comparing, self._incomparable = self._comparing or self._incomparable, False
        self._wake()

    def ended(self, step: int) -> Uploaded | None:
        """What became of the upload of `step`, which was committed; None while that is open."""
        ended = self._queue.ended(step)
        if ended is None and self._compared and step not in self._queue.held:
            ended = Ended(step, "dropped", "it is in neither tier any more")
        return None if ended is None else self._message(ended)

    async def retain(self, remove: Callable[[Collection[int]], None]) -> None:
        """After a commit, or an upload: let newer steps stand for older ones that wait, then `remove` from the first
        tier, in a thread, what no rule keeps and nobody has to copy any more: it is given what has to stay. Raises
        OSError and CheckpointError."""
        async with self._retaining:
            if len(self._queue.queued) > 1:
                wanted = await self._services.in_thread(self._wanted, self._first)
                for ended in self._queue.trim(wanted):
                    log.warning("step %d of %s is not uploaded: %s", ended.step, self._directory, ended.reason)
                    self._chronicle.dropped(ended.step, ended.reason)
                    self._tell(self._message(ended))
            held = self._queue.held
            await self._services.in_thread(lambda: remove(held), self._first)

    def status(self) -> UploadStatus:
        return self._chronicle.status(self._directory, self.url, self._queue.uploading, self._queue.queued)

    async def close(self) -> None:
        """Leave to the next saver what is under way; its thread is not waited for."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- one at a time ---------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self.idle and not self._closed:
            self._task = self._services.loop.create_task(self._work())

    async def _work(self) -> None:
        while True:
            step = self._queue.begin()
            if step is not None:
                await self._upload(step)
            elif self._comparing:
                self._comparing = False
                await self._compare()
            else:
                self._on_rest()
                return

    async def _upload(self, step: int) -> None:
        self._chronicle.begun(step)
        try:
            result = await self._services.in_upload_thread(lambda: self._copy(step))
        except _Gone as error:
            ended = self._queue.gone(str(error))
            self._chronicle.dropped(step, ended.reason)
            log.warning("step %d of %s is not uploaded: %s", step, self._directory, error)
        except Exception as error:  # whatever it is, the next one is tried
            ended = self._queue.failed(str(error) or repr(error))
            self._chronicle.failed(step, ended.reason, error)
            _log(error, f"step {step} of {self._directory} is not uploaded, it is tried again after the next commit")
        else:
            ended = self._queue.done()
            self._chronicle.uploaded(step, result.bytes)
            log.info("step %d of %s: uploaded to %s", step, self._directory, result.path)
        self._tell(self._message(ended))
        await self._retain_both(uploaded=ended.outcome == "uploaded")

    async def _retain_both(self, *, uploaded: bool) -> None:
        policy = self._policy
        try:
            await self.retain(lambda held: self._first.retain(policy, held))
            if uploaded:
                await self._services.in_upload_thread(lambda: self._second.retain(policy))
        except Exception as error:  # whatever it is, the next upload is made
            _log(error, f"retention in {self._directory} and {self.url} failed")

    async def _compare(self) -> None:
        try:
            there, missing = await self._services.in_upload_thread(self._difference)
        except Exception as error:  # whatever it is, commits are uploaded
            self._incomparable = True
            _log(error, f"{self._directory} and {self.url} cannot be compared")
            return
        self._compared = True
        self._queue.compared(there, missing)
        for step in missing:
            self._chronicle.committed(step)
        if missing:
            log.info("steps %s of %s are not in %s yet", missing, self._directory, self.url)

    def _message(self, ended: Ended) -> Uploaded:
        url = f"{self.url}/{checkpoint_name(ended.step)}" if ended.outcome == "uploaded" else ""
        return Uploaded(step=ended.step, outcome=ended.outcome, url=url, reason=ended.reason[:MAX_REASON_CHARS])

    # --- in threads ------------------------------------------------------------------------------------------------

    def _copy(self, step: int) -> CommitResult:
        source = Path(self._directory) / checkpoint_name(step)
        with reading(source):
            try:
                original = manifest_bytes(source / MANIFEST_NAME)
            except FileNotFoundError as error:
                raise _Gone(f"{source} was removed before it was uploaded") from error
            content = decode_manifest(original)
            job = CommitJob(
                directory=self.url,
                step=step,
                image=str(source),
                files=tuple(content.files),
                run=content.run,
                timeout_s=self._timeout_s,
                original=original,
            )
            return self._second.commit_once(job, lambda: True)

    def _wanted(self) -> set[int]:
        """The steps that a rule keeps for what they are, however many newer ones there are."""
        rules = kept_by(metrics_of(self._directory), self._policy)
        return {step for step, names in rules.items() if {"keep_every", "keep_best"} & {*names}}

    def _difference(self) -> tuple[set[int], list[int]]:
        """What the second tier has, and what it lacks of the first, as far as retention would leave it there."""
        here = {each.step: each for each in manifests(self._directory)}
        if self._policy.keeps_all:  # there may be thousands there
            found = [_manifest_at(self._place / checkpoint_name(step)) for step in here]
            there = {each.step: each for each in found if each is not None}
        else:
            there = {each.step: each for each in manifests(self._place)}
        for step in sorted(here.keys() & there.keys()):
            if here[step].run != there[step].run:
                log.warning("%s has a step %d of another run than %s: neither is touched",
                            self._place, step, self._directory)  # fmt: skip
        union = [(each.step, each.metrics) for each in {**there, **here}.values()]
        going = {*expired(union, self._policy)}
        return {*there}, sorted(here.keys() - there.keys() - going, reverse=True)


def _log(error: Exception, what: str) -> None:
    """With its traceback if nobody foresaw it."""
    log.error("%s: %s", what, str(error) or repr(error),
              exc_info=None if isinstance(error, (CheckpointError, OSError)) else error)  # fmt: skip


def _manifest_at(checkpoint: Location) -> Manifest | None:
    try:
        return decode_manifest(manifest_bytes(checkpoint / MANIFEST_NAME))
    except FileNotFoundError:
        return None
