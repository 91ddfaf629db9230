"""What may go from a prefix of an object store: parts and files of commits whose savers are gone, and whole steps."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Mapping

from async_ckpt.core.attempts import Attempts
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Url
from async_ckpt.core.manifest import MANIFEST_NAME, checkpoint_name, manifests, parse_step
from async_ckpt.core.object_errors import ObjectError
from async_ckpt.core.objects import Object, Objects
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.signed import Upload, parse_uploads

from .collection import Removal
from .reservation import Reservations
from .retention import expired
from .temporaries import new_nonce

log = logging.getLogger(__name__)

_REMOVAL_LEASE_S = 600.0
_GC_S = 300.0
_IN_USE = "a saver is at work on it, or was within its timeout_s"


def collect_objects(
    url: Url, policy: Policy, *, dry_run: bool, progress: Callable[[Removal], None] = lambda removal: None
) -> list[Removal]:
    """As `collection.collect`, for a prefix. Nothing keeps a checkpoint that is being read."""
    attempts = Attempts(_GC_S)
    objects = Objects(url, attempts)
    if not objects.any_below(url.key) and not unfinished_uploads(objects, url):
        raise CheckpointError(f"there is nothing at {url}: give the directory that attach was given")
    removals = []

    def note(removal: Removal) -> None:
        removals.append(removal)
        progress(removal)

    for leftover in collect_leftovers(objects, url, dry_run=dry_run):
        note(leftover)
    contents = manifests(url)
    sizes = {each.step: each.total_bytes for each in contents}
    for step in expired([(each.step, each.metrics) for each in contents], policy):
        reason = ""
        if not dry_run:
            try:
                remove_step(objects, url, step, attempts)
            except CheckpointError as error:
                reason = str(error)
        note(Removal(checkpoint_name(step), sizes[step], "checkpoint", not dry_run and not reason, reason))
    return removals


def collect_leftovers(objects: Objects, url: Url, *, dry_run: bool) -> Iterator[Removal]:
    """Remove what nobody works on any more: uploads first asked for, then reservations, so that an upload that began
    in between is not taken for one without."""
    uploads = unfinished_uploads(objects, url)
    reservations = Reservations(objects, url)
    busy = set()
    for step in reservations.steps():
        found = reservations.look(step)
        if found is None:
            continue
        holder, about = found
        there = objects.walk((url / checkpoint_name(step)).key)
        committed = holder.purpose == "commit" and MANIFEST_NAME in there
        size_bytes = about.bytes if committed else sum(each.bytes for each in there.values()) + about.bytes
        if not reservations.is_free(holder, about.modified_s):
            busy.add(step)
            yield Removal(checkpoint_name(step), size_bytes, "leftover", False, _IN_USE)
            continue
        if not dry_run:
            try:
                held = reservations.take(step, new_nonce(), "removal", _REMOVAL_LEASE_S, Attempts(0.0))
            except CheckpointError:  # another one collects it just now
                continue
            if not committed:
                clear_step(objects, url, step, there)
            reservations.release(held)
        what = "the reservation of a commit" if committed else f"half a {holder.purpose}"
        yield Removal(checkpoint_name(step), size_bytes, "leftover", not dry_run, f"{what}, its saver is gone")
    for upload in uploads:
        of_step = _step_of(url, upload)
        if of_step is None or of_step in busy:
            continue
        if not dry_run:
            abort(objects, upload)
        yield Removal(f"{upload.key} (upload {upload.upload_id[:12]})", 0, "leftover", not dry_run, "never completed")
    for key in reservations.old_probes():
        if not dry_run:
            objects.remove([key])
        yield Removal(key, 0, "leftover", not dry_run, "a probe")


def clear_step(objects: Objects, url: Url, step: int, there: Mapping[str, Object]) -> None:
    """Remove what is `there` of a step that we hold, its manifest first: half a checkpoint is none. Then its parts."""
    folder = (url / checkpoint_name(step)).key
    if MANIFEST_NAME in there:
        objects.remove([f"{folder}/{MANIFEST_NAME}"])
    objects.remove([f"{folder}/{path}" for path in there if path != MANIFEST_NAME])
    abort_uploads(objects, url / checkpoint_name(step))


def remove_step(objects: Objects, url: Url, step: int, attempts: Attempts) -> None:
    """Delete a checkpoint; who looks for it sees it whole or not at all, whenever we are killed. Raises CheckpointError
    if another saver is at work on it."""
    reservations = Reservations(objects, url)
    held = reservations.take(step, new_nonce(), "removal", _REMOVAL_LEASE_S, attempts)
    clear_step(objects, url, step, objects.walk((url / checkpoint_name(step)).key))
    reservations.release(held)


def unfinished_uploads(objects: Objects, url: Url) -> list[Upload]:
    """Multipart uploads below `url`. Only S3 tells: Azure drops its parts after a week, for GCS see docs. A store that
    will not tell is warned of, for checkpoints can do without."""
    if url.scheme != "s3":
        return []
    found: list[Upload] = []
    query = {"uploads": "", "prefix": f"{url.key}/" if url.key else ""}
    while True:
        try:
            uploads, markers = parse_uploads(objects.request("GET", "", query))
        except ObjectError as error:
            if error.passing or error.errno == errno.ENOENT:
                raise
            log.warning("unfinished uploads cannot be collected, give the bucket a lifecycle rule that does: %s", error)
            return found
        found += [each for each in uploads if not url.key or each.key.startswith(f"{url.key}/")]
        if markers is None or markers == (query.get("key-marker"), query.get("upload-id-marker")):
            return found
        query = {**query, "key-marker": markers[0], "upload-id-marker": markers[1]}


def abort_uploads(objects: Objects, url: Url) -> None:
    """All below `url`."""
    for upload in unfinished_uploads(objects, url):
        abort(objects, upload)


def abort(objects: Objects, upload: Upload) -> None:
    """One that is gone already is no error."""
    try:
        objects.request("DELETE", upload.key, {"uploadId": upload.upload_id})
    except (CheckpointError, OSError) as error:
        if "NoSuchUpload" not in str(error):
            raise


def _step_of(url: Url, upload: Upload) -> int | None:
    skip = len(url.key) + 1 if url.key else 0
    return parse_step(upload.key[skip:].partition("/")[0])
