"""Checkpoints in an object store: the same names as in a directory, and the manifest, written last, is the commit.

There is no rename, so files lie under their final names before the checkpoint can be seen: it can when its manifest is
there, which is created only if none is. A reservation keeps other savers from the step's objects meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

from async_ckpt.core import manifest
from async_ckpt.core.attempts import Attempts
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Url
from async_ckpt.core.manifest import MANIFEST_NAME, checkpoint_name
from async_ckpt.core.objects import Object, Objects
from async_ckpt.core.retention_policy import Policy

from .datafile import StepHook, Written
from .manifest_writing import manifest_of, stops_in
from .multipart import upload_bytes, upload_image_file
from .object_collection import abort_uploads, clear_step, collect_leftovers, remove_step
from .reservation import Held, Reservations
from .retention import expired
from .storage import Committed
from .writer import AlreadyCommittedError, CommitError, CommitJob, CommitResult, check_files

log = logging.getLogger(__name__)

_SWEEP_S = 30.0
_TIDY_S = 5.0  # after a failure, of which ranks wait to hear; what fails for long cannot be tidied either
_PREPARE_S = 60.0


class ObjectStorage:
    """`storage.Storage` below `url`. What fails for a while is tried again until the run's `timeout_s` is over."""

    far = True

    def __init__(self, url: Url) -> None:
        self.directory = str(url)
        self._url = url

    def prepare(self) -> Callable[[], None]:
        self._sweep(Attempts(_PREPARE_S))
        return lambda: None  # a prefix is nothing that could be made

    def sweep(self) -> None:
        self._sweep(Attempts(_SWEEP_S))

    def _sweep(self, attempts: Attempts) -> None:
        objects = Objects(self._url, attempts)
        Reservations(objects, self._url).now_s()  # that this can be written to
        for leftover in collect_leftovers(objects, self._url, dry_run=False):
            log.info("%s: removed %s (%d bytes): %s", self._url, leftover.name, leftover.bytes, leftover.reason)

    def newest(self) -> tuple[int, str] | None:
        path = manifest.latest(self._url)
        step = None if path is None else manifest.parse_step(path.name)
        return None if step is None else (step, str(path))

    def committed_by(self, run: str) -> list[Committed]:
        return [
            Committed(each.step, str(self._url / checkpoint_name(each.step)), each.total_bytes)
            for each in manifest.manifests(self._url)
            if each.run == run
        ]

    def retain(self, policy: Policy, held: Collection[int] = ()) -> None:
        if policy.keeps_all:
            return
        attempts = Attempts(_PREPARE_S)
        for step in expired([(each.step, each.metrics) for each in manifest.manifests(self._url)], policy):
            if step in held:
                continue
            try:
                remove_step(Objects(self._url, attempts), self._url, step, attempts)
            except CheckpointError as error:
                log.error("retention in %s: %s", self._url, error)

    def commit_once(
        self, job: CommitJob, still_whole: Callable[[], bool], step_hook: StepHook = lambda name: None
    ) -> CommitResult:
        try:
            check_files(job)
            return _Commit(self._url, job, still_whole, step_hook).run()
        except CommitError:
            raise
        except Exception as error:
            known = isinstance(error, (OSError, CheckpointError))
            reason = f"step {job.step} was not committed to {self._url}: {error if known else repr(error)}"
            raise CommitError(reason, getattr(error, "errno", None)) from error


class _Commit:
    """One attempt to put one step there."""

    def __init__(self, url: Url, job: CommitJob, still_whole: Callable[[], bool], step_hook: StepHook) -> None:
        self._url = url
        self._job = job
        self._still_whole = still_whole
        self._step_hook = step_hook
        self._attempts = Attempts(job.timeout_s)
        self._objects = Objects(url, self._attempts)
        self._reservations = Reservations(self._objects, url)
        self._folder = url / checkpoint_name(job.step)

    def run(self) -> CommitResult:
        started_s = time.perf_counter()
        job = self._job
        self._step_hook("reserve")
        held = self._reservations.take(job.step, job.run, "commit", job.timeout_s, self._attempts)
        try:
            before = self._committed_before(held)
            if before is not None:
                return before
            written = self._write_files(held)
            written_s = time.perf_counter()
            self._publish(written, held)
        except BaseException:
            self._tidy(held)
            raise
        self._step_hook("release")
        self._release(held)
        return CommitResult(
            path=str(self._folder),
            bytes=sum(file.entry.bytes for file in written.values()),
            write_s=written_s - started_s,
            commit_s=time.perf_counter() - written_s,
            direct=False,
        )

    def _committed_before(self, held: Held) -> CommitResult | None:
        """What this very run has committed of the step. Raises AlreadyCommittedError if somebody else has."""
        there = self._objects.walk(self._folder.key)
        if MANIFEST_NAME in there:
            found = manifest.read_manifest(self._folder)
            self._release(held)
            if (found.run, found.step) != (self._job.run, self._job.step):
                raise self._taken(f"{self._folder} exists already")
            return CommitResult(str(self._folder), found.total_bytes, write_s=0.0, commit_s=0.0, direct=False)
        if there and held.fresh:
            self._release(held)
            raise self._taken(f"{self._folder} holds objects of another program ({', '.join(sorted(there)[:3])})")
        if not held.fresh:  # objects of one who has given up, or parts of an upload alone
            clear_step(self._objects, self._url, self._job.step, there)
        return None

    def _write_files(self, held: Held) -> dict[str, Written]:
        def before_part() -> None:
            if held.expired:
                raise self._too_slow()

        if self._job.parts is not None:
            raise CheckpointError(f"{self._url} is no place where several hosts write parts of a file")
        written, stops = {}, stops_in(self._job)
        for path in self._job.files:
            before_part()
            self._step_hook(f"write:{path}")
            key = (self._folder / path).key
            written[path] = upload_image_file(
                self._objects, key, self._job.image, path, before_part, mapped=not self._job.original,
                stops=stops.get(path),
            )  # fmt: skip
        for path, data in self._job.documents.items():
            before_part()
            self._step_hook(f"write:{path}")
            written[path] = upload_bytes(self._objects, (self._folder / path).key, data)
        return written

    def _publish(self, written: dict[str, Written], held: Held) -> None:
        self._step_hook("list")
        if self._attempts.retries:  # an upload that was given up may not have been aborted
            abort_uploads(self._objects, self._folder)
        there = self._objects.walk(self._folder.key)
        for path, file in written.items():
            if there.get(path) is None or there[path].bytes != file.entry.bytes:
                raise CheckpointError(f"{self._folder / path} was changed by another program while it was written")
        if not self._still_whole():
            raise CheckpointError(f"the slot of step {self._job.step} was taken by another step while it was read")
        if held.expired:
            raise self._too_slow()
        self._step_hook("manifest")
        data = manifest_of(self._job, written)
        if not self._objects.create((self._folder / MANIFEST_NAME).key, data):
            raise self._taken(f"{self._folder} exists already")

    def _too_slow(self) -> CheckpointError:
        return CheckpointError(
            f"the upload is not done after {self._job.timeout_s:g} s: raise timeout_s, or see why the store is slow"
        )

    def _taken(self, why: str) -> AlreadyCommittedError:
        return AlreadyCommittedError(f"step {self._job.step} was not committed to {self._url}: {why}")

    def _release(self, held: Held) -> None:
        try:
            self._reservations.release(held)
        except (CheckpointError, OSError) as error:  # the next sweep removes it
            log.warning("the reservation of step %d in %s stays for now: %s", self._job.step, self._url, error)

    def _tidy(self, held: Held) -> None:
        """Nothing of a failed commit stays, as far as the store lets us; the next sweep removes the rest.

        A manifest that is there stays: its answer was lost, and what it names is whole.
        """
        attempts = Attempts(_TIDY_S)
        objects = Objects(self._url, attempts)
        reservations = Reservations(objects, self._url)
        try:
            found = reservations.look(held.reservation.step)
            if found is None or found[0].nonce != held.reservation.nonce:
                return  # released, or somebody else's by now
            there: dict[str, Object] = objects.walk(self._folder.key)
            if MANIFEST_NAME not in there:
                clear_step(objects, self._url, self._job.step, there)
            reservations.release(held)
        except (CheckpointError, OSError) as error:
            log.error("what was uploaded of step %d stays in %s until the next attach or gc: %s",
                      self._job.step, self._url, error)  # fmt: skip
