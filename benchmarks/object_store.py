"""A commit to an object store against `obstore.put` of the same bytes, and a restore's reads against `obstore.get`.

PYTHONPATH=.:service python -m benchmarks.object_store                     # SeaweedFS on loopback, started and removed
PYTHONPATH=.:service python -m benchmarks.object_store --url s3://bucket/prefix      # yours, with your environment

The ways take turns within one run. Ours also hashes every byte, reserves the step, writes two small files and the
manifest. On loopback the server takes most of the machine: the ratio says more than the rates.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import obstore

from async_ckpt.core.location import Url, location_of
from async_ckpt.core.objects import Objects
from async_ckpt_saver.object_storage import ObjectStorage
from async_ckpt_saver.writer import CommitJob

FILE = "adapter_model.safetensors"
DOCUMENTS = {"adapter_config.json": b"{}", "README.md": b"read me"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a prefix to write below (default: a SeaweedFS of our own)")
    parser.add_argument("--bytes", type=int, default=400_000_000, help="of the adapter")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    image = Path(tempfile.mkdtemp(prefix="object-store-", dir="/dev/shm"))
    try:
        with (image / FILE).open("wb") as file:
            for _ in range(0, arguments.bytes, 1 << 20):
                file.write(os.urandom(1 << 20))
        with _store(arguments.url) as url:
            compare(url, image, arguments.rounds)
    finally:
        shutil.rmtree(image)


@contextlib.contextmanager
def _store(given: str | None) -> Iterator[Url]:
    if given is not None:
        yield location_of(given) / f"bench-{os.getpid()}"
        return
    from tests.cloud.weed import Weed  # only here: others bring their own store

    folder = Path(tempfile.mkdtemp(prefix="object-store-"))
    try:
        with Weed(folder) as weed:
            weed.make_bucket("bench")
            os.environ.update(weed.environment())
            yield Url("s3://bench/run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(url: Url, image: Path, rounds: int) -> None:
    objects, storage = Objects(url), ObjectStorage(url)
    length = (image / FILE).stat().st_size
    step = 0

    def ours() -> None:
        nonlocal step
        step += 1
        job = CommitJob(str(url), step, str(image), (FILE,), DOCUMENTS, run="bench")
        storage.commit_once(job, lambda: True)

    def plain() -> None:
        with (image / FILE).open("rb") as file:
            obstore.put(objects.store, f"{url.key}/plain", file)

    def same_parts() -> None:
        with (image / FILE).open("rb") as file:
            obstore.put(objects.store, f"{url.key}/plain", file, chunk_size=8 << 20, max_concurrency=6)

    def ranges() -> None:
        got = sum(len(data) for _, data in objects.read_ranges(f"{url.key}/plain", [(0, length)]))
        assert got == length

    def get() -> None:
        assert len(obstore.get(objects.store, f"{url.key}/plain").bytes()) == length

    ways: dict[str, Callable[[], None]] = {
        "ours: commit, hashed": ours,
        "obstore.put(file)": plain,
        "obstore.put, our parts": same_parts,
        "ours: ranged reads of all of it": ranges,
        "obstore.get": get,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    try:
        for number in range(rounds + 1):
            for name, way in ways.items():
                started_s = time.perf_counter()
                way()
                if number:  # the first round warms up
                    times[name].append(time.perf_counter() - started_s)
            objects.remove([f"{url.key}/{path}" for path in objects.walk(url.key) if path.startswith("checkpoint-")])
    finally:
        objects.remove([f"{url.key}/{path}" for path in objects.walk(url.key)])
    print(f"{length / 1e6:.0f} MB, {rounds} rounds, median (fastest - slowest); {os.cpu_count()} cores")
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{name:<32} {middle:6.2f} s  {length / middle / 1e6:6.0f} MB/s  ({min(taken):.2f} - {max(taken):.2f})")
    put, get_s = statistics.median(times["obstore.put(file)"]), statistics.median(times["obstore.get"])
    print(f"commit / put: {put / statistics.median(times['ours: commit, hashed']):.2f} of its rate; "
          f"ranged reads / get: {get_s / statistics.median(times['ours: ranged reads of all of it']):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
