"""Will commits to an object store work? Each check does the real thing, below the prefix, and removes it again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from async_ckpt.core.attempts import Attempts
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import SCHEMES, Url
from async_ckpt.core.objects import PART_BYTES, Objects

from .examination import Finding
from .object_collection import unfinished_uploads
from .reservation import FOLDER, Reservations
from .status import wall_clock_s
from .temporaries import new_nonce

_PATIENCE_S = 15.0
_TRIES = 5
_SLOW_S = 0.5
_SKEW_S = 60.0


def examine_store(url: Url) -> Iterator[Finding]:
    """One finding after the other; the first that fails is the last."""
    try:
        yield from _examine(url)
    except (CheckpointError, OSError) as error:
        yield Finding("store", "fail", str(error), "no commit will work until this does")


def _examine(url: Url) -> Iterator[Finding]:
    objects = Objects(url, Attempts(_PATIENCE_S))
    reservations = Reservations(objects, url)
    times, skew_s = [], 0.0
    for _ in range(_TRIES):
        started_s = time.perf_counter()
        skew_s = wall_clock_s() - reservations.now_s()
        times.append((time.perf_counter() - started_s) / 3)
    each_s = statistics.median(times)
    slow = each_s > _SLOW_S
    found = f"{url} can be written ({SCHEMES[url.scheme]}): {each_s * 1e3:.1f} ms a request (median of {_TRIES})"
    advice = "a commit takes a dozen one after the other; training does not wait for them" if slow else ""
    yield Finding("store", "warn" if slow else "ok", found, advice)
    yield _clock(skew_s)
    yield _conditional(objects, url)
    yield _multipart(objects, url)


def _clock(skew_s: float) -> Finding:
    skewed = abs(skew_s) > _SKEW_S
    advice = "set this host's clock: stores refuse requests that are 15 minutes off" if skewed else ""
    return Finding("store clock", "warn" if skewed else "ok", f"{skew_s:+.0f} s from here", advice)


def _conditional(objects: Objects, url: Url) -> Finding:
    key = (url / FOLDER / f"probe-{new_nonce()}").key
    try:
        first, second = objects.create(key, b"first"), objects.create(key, b"second")
    finally:
        objects.remove([key])
    if first and not second:
        return Finding("create", "ok", "an object that is there is not replaced")
    return Finding(
        "create",
        "fail",
        "the store does not know conditional writes (If-None-Match): it replaced an object that was there",
        "use a store that does (S3, GCS, Azure, MinIO, R2, SeaweedFS): else two savers can mix one checkpoint",
    )


def _multipart(objects: Objects, url: Url) -> Finding:
    key = (url / FOLDER / f"probe-{new_nonce()}").key
    data = bytes(PART_BYTES)
    try:
        objects.upload(key, 2 * len(data), lambda: iter([memoryview(data), memoryview(data)]))
        about = objects.stat(key)
    finally:
        objects.remove([key])
    if about is None or about.bytes != 2 * len(data):
        return Finding("multipart", "fail", f"two parts of {len(data)} bytes became {about}", "use another store")
    left = unfinished_uploads(objects, url)
    advice = "gc removes those whose savers are gone" if left else ""
    return Finding("multipart", "warn" if left else "ok", f"works; {len(left)} unfinished below {url}", advice)
