"""The objects of one bucket, with every request tried again as `Attempts` says. The only module that knows `obstore`.

Credentials, region and endpoint come from the environment, as `obstore` reads it (AWS_*, GOOGLE_*, AZURE_*).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import msgspec

from .attempts import Attempts
from .errors import CheckpointError
from .location import Url

T = TypeVar("T")

PART_BYTES = 8 << 20
_MAX_PARTS = 9_000  # S3 allows 10 000
_CONCURRENT_PARTS = 6
_CONCURRENT_READS = 8
_READ_BYTES = 16 << 20  # of one ranged request
GAP_BYTES = 256 << 10  # read along rather than asked for anew
_TIMEOUT_S = 120.0
_REQUEST_S = 30.0  # of one request; a part of 8 MiB then needs 0.3 MB/s


class Object(msgspec.Struct, frozen=True):
    """`modified_s` by the clock of the store. Of `e_tag` and `version`, which change with the content, each store has
    one or both."""

    bytes: int
    modified_s: float
    e_tag: str | None = None
    version: str | None = None


class Objects:
    """Keys are within the bucket of `url`. Without `attempts` each call may take two minutes in all.

    Raises ObjectError saying what is wrong with the store, FileNotFoundError for an object that is not there.
    """

    def __init__(self, url: Url, attempts: Attempts | None = None) -> None:
        self._url = url
        self._attempts = attempts
        request_s = _REQUEST_S if attempts is None else max(1.0, min(_REQUEST_S, attempts.timeout_s))
        self.store = store_of(url.scheme, url.bucket, request_s)
        self._obstore = _obstore()

    def read(self, key: str, limit_bytes: int | None = None) -> bytes:
        """All of it, or its first `limit_bytes`."""
        return self.fetch(key, limit_bytes)[0]

    def fetch(self, key: str, limit_bytes: int | None = None) -> tuple[bytes, Object]:
        """As `read`, with what is known of this very content."""

        def work() -> tuple[bytes, Object]:
            found = self._obstore.get(self.store, key)
            about = _object(found.meta)
            if limit_bytes is not None and about.bytes > limit_bytes:
                return bytes(self._obstore.get_range(self.store, key, start=0, end=limit_bytes)), about
            return bytes(found.bytes()), about

        return self._run("reading", key, work)

    def read_range(self, key: str, start: int, stop: int) -> memoryview:
        """Bytes [start, stop); fewer if the object ends before."""
        if start >= stop:
            return memoryview(b"")
        return self._run(
            "reading", key, lambda: memoryview(self._obstore.get_range(self.store, key, start=start, end=stop))
        )

    def read_ranges(self, key: str, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """(start, bytes) that cover every one of `ranges`, in order, several requests at a time; a few bytes more where
        that saves requests."""
        wanted = list(_requests(ranges))
        with ThreadPoolExecutor(_CONCURRENT_READS, thread_name_prefix="ranges") as pool:
            for first in range(0, len(wanted), _CONCURRENT_READS):  # so that no more than these are in memory
                batch = wanted[first : first + _CONCURRENT_READS]
                found = pool.map(lambda each: self.read_range(key, *each), batch)
                yield from zip((start for start, _ in batch), found, strict=True)

    def stat(self, key: str) -> Object | None:
        if not key:
            return None
        try:
            return _object(self._run("looking for", key, lambda: self._obstore.head(self.store, key)))
        except FileNotFoundError:
            return None

    def names(self, prefix: str) -> tuple[list[str], dict[str, Object]]:
        """What lies directly below `prefix`: names of folders, and objects by name."""
        found = self._run("listing", prefix, lambda: self._obstore.list_with_delimiter(self.store, prefix or None))
        skip = len(prefix) + 1 if prefix else 0
        folders = [path[skip:] for path in found["common_prefixes"]]
        return folders, {each["path"][skip:]: _object(each) for each in found["objects"]}

    def walk(self, prefix: str) -> dict[str, Object]:
        """Every object below `prefix`, by its path from there."""

        def work() -> dict[str, Object]:
            chunks = self._obstore.list(self.store, prefix or None, chunk_size=1000)
            skip = len(prefix) + 1 if prefix else 0
            return {each["path"][skip:]: _object(each) for chunk in chunks for each in chunk}

        return self._run("listing", prefix, work)

    def any_below(self, prefix: str) -> bool:
        def work() -> bool:
            return any(chunk for chunk in self._obstore.list(self.store, prefix or None, chunk_size=1))

        return self._run("listing", prefix, work)

    def write(self, key: str, data: bytes | memoryview) -> None:
        self._run("writing", key, lambda: self._obstore.put(self.store, key, data, use_multipart=False))

    def create(self, key: str, data: bytes) -> bool:
        """Write it if there is no object of that name, in one operation; False if there is, with other content.

        `data` must be of this writer alone: an answer that was lost is told from a loser by it.
        """
        return self._put_if(key, data, "create")

    def replace(self, key: str, data: bytes, about: Object) -> bool:
        """Write it if the object there is still the one that `about` tells of, in one operation. `data` as for
        `create`."""
        known = {"e_tag": about.e_tag, "version": about.version}
        return self._put_if(key, data, {name: value for name, value in known.items() if value is not None})

    def _put_if(self, key: str, data: bytes, mode: Any) -> bool:
        def work() -> bool:
            try:
                self._obstore.put(self.store, key, data, mode=mode, use_multipart=False)
            except _already_there():
                try:
                    return bytes(self._obstore.get(self.store, key).bytes()) == data
                except FileNotFoundError:
                    return False  # it was there, and is gone again
            return True

        return self._run("writing", key, work)

    def upload(self, key: str, length_bytes: int, pieces: Callable[[], Iterator[memoryview]]) -> None:
        """Write a large object in parts, several at a time, from pieces of PART_BYTES that are not copied here. It is
        there whole or not at all; after an error or a kill its parts may be: see `uploads`.

        `pieces` is called again for each attempt. What it raises ends the upload.
        """
        part_bytes = max(1, -(-length_bytes // (_MAX_PARTS * PART_BYTES))) * PART_BYTES
        self._run(
            "writing",
            key,
            lambda: self._obstore.put(
                self.store,
                key,
                pieces(),
                use_multipart=True,
                chunk_size=part_bytes,
                max_concurrency=_CONCURRENT_PARTS,
            ),
        )

    def remove(self, keys: Sequence[str]) -> None:
        """One that is gone already is no error."""

        def work(batch: Sequence[str]) -> None:
            try:
                self._obstore.delete(self.store, list(batch))
            except FileNotFoundError:
                for key in batch:
                    try:
                        self._obstore.delete(self.store, key)
                    except FileNotFoundError:
                        continue

        for first in range(0, len(keys), 1000):
            batch = keys[first : first + 1000]
            self._run("removing", batch[0], lambda batch=batch: work(batch))  # type: ignore[misc]

    def request(self, method: str, key: str, query: dict[str, str]) -> bytes:
        """A request of S3 that obstore has no verb for, signed by it. Returns the body of the answer."""
        from .signed import send

        return self._run("asking for", key, lambda: send(self._url, method, key, query))

    def _run(self, doing: str, key: str, work: Callable[[], T]) -> T:
        what = f"{doing} {self._url.scheme}://{self._url.bucket}/{key}"
        return (self._attempts or Attempts(_TIMEOUT_S)).run(what, work)


def _object(meta: Any) -> Object:
    return Object(meta["size"], meta["last_modified"].timestamp(), meta["e_tag"], meta["version"])


def _requests(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbours together, and nothing larger than _READ_BYTES."""
    merged: list[list[int]] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if merged and start - merged[-1][1] <= GAP_BYTES:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    for start, stop in merged:
        for position in range(start, stop, _READ_BYTES):
            yield position, min(stop, position + _READ_BYTES)


def _obstore() -> Any:
    try:
        import obstore
    except ModuleNotFoundError as error:
        raise CheckpointError(
            "object stores need obstore, in trainer and saver alike: pip install 'async-ckpt[cloud]'"
        ) from error
    return obstore


@functools.lru_cache(maxsize=64)
def store_of(scheme: str, bucket: str, request_s: float, **changes: str) -> Any:
    """A client; its connections are kept. `changes` are settings that win over the environment."""
    _obstore()
    from obstore.store import AzureStore, GCSStore, S3Store

    made, variable = {
        "s3": (S3Store, "AWS_ALLOW_HTTP"),
        "gs": (GCSStore, "GOOGLE_ALLOW_HTTP"),
        "az": (AzureStore, "AZURE_ALLOW_HTTP"),
    }[scheme]
    options = {
        "timeout": timedelta(seconds=request_s),
        "connect_timeout": timedelta(seconds=min(5.0, request_s)),
        # Given here, the client's own settings are no longer read from the environment.
        "allow_http": os.environ.get(variable, "").lower() in ("1", "true", "yes"),
    }
    # Short: what takes longer is `Attempts`' to decide, which tells of it.
    retries = {
        "max_retries": 3,
        "retry_timeout": timedelta(seconds=min(10.0, request_s)),
        "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2), "base": 2},
    }
    try:
        return made(bucket, client_options=options, retry_config=retries, **changes)
    except Exception as error:
        raise CheckpointError(f"{scheme}://{bucket}: {str(error).partition(chr(10))[0]}") from error


def _already_there() -> tuple[type[Exception], ...]:
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    return AlreadyExistsError, PreconditionError, FileExistsError
