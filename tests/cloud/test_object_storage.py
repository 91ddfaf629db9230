"""Commits to a real S3 server: the same bytes as on disk, whole or not at all, one winner."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import xxhash

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Location, Url, location_of
from async_ckpt.core.manifest import (
    FORMAT_IN_PIECES,
    MANIFEST_NAME,
    FileEntry,
    committed,
    encode_manifest,
    latest,
    manifest_bytes,
    read_manifest,
)
from async_ckpt.core.objects import Objects
from async_ckpt.core.pieces import digest_of_pieces, piece_line
from async_ckpt.core.retention_policy import Policy
from async_ckpt_saver.object_collection import collect_objects, unfinished_uploads
from async_ckpt_saver.object_storage import ObjectStorage
from async_ckpt_saver.reservation import Reservations
from async_ckpt_saver.storage import Storage
from async_ckpt_saver.verification import verify
from async_ckpt_saver.writer import AlreadyCommittedError, CommitError, CommitJob, commit
from tests.cloud.weed import Weed
from tests.saver.committing import ADAPTER, DOCUMENTS, STATE, job_of, make_image

FILES = {ADAPTER, STATE, *DOCUMENTS}


def job_at(url: Url, step: int, image: Path, **changes: object) -> CommitJob:
    job = job_of(Path("/unused"), step, image)
    return msgspec.structs.replace(job, directory=str(url), **{"timeout_s": 60.0, **changes})


def put(url: Url, step: int, image: Path, **changes: object) -> str:
    return ObjectStorage(url).commit_once(job_at(url, step, image, **changes), lambda: True).path


def below(objects: Objects, url: Url) -> set[str]:
    return set(objects.walk(url.key))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts, the last one short."""
    return make_image(tmp_path_factory.mktemp("image") / "image", adapter_bytes=(17 << 20) + 4097)


def test_a_commit_is_byte_for_byte_what_a_directory_gets(
    url: Url, objects: Objects, image: Path, tmp_path: Path
) -> None:
    storage: Storage = ObjectStorage(url)
    storage.prepare()
    assert below(objects, url) == set()  # the probe is gone
    result = storage.commit_once(job_at(url, 7, image), lambda: True)
    local = Path(commit(job_of(tmp_path / "run", 7, image)).path)
    assert (result.path, result.bytes) == (f"{url}/checkpoint-7", read_manifest(local).total_bytes)
    assert below(objects, url) == {f"checkpoint-7/{name}" for name in {*FILES, "async_ckpt.json"}}
    for name in FILES:
        assert objects.read((url / "checkpoint-7" / name).key) == (local / name).read_bytes(), name
    ours, theirs = read_manifest(result.path), read_manifest(local)
    assert (ours.files, ours.chunks, len(ours.files)) == (theirs.files, theirs.chunks, 5)
    assert [(step, str(path)) for step, path in committed(str(url))] == [(7, f"{url}/checkpoint-7")]
    assert str(latest(str(url))) == f"{url}/checkpoint-7"
    assert unfinished_uploads(objects, url) == []


def test_a_checkpoint_that_several_hosts_wrote_is_uploaded_and_verified_by_its_pieces(
    url: Url, image: Path, tmp_path: Path
) -> None:
    """Pieces end where the hosts' parts do, anywhere in the store's own."""

    def placed(checkpoint: Location) -> list[tuple[int | None, int | None]]:
        """Other bytes than were committed; these are random, and no safetensors file."""
        return [(each.start, each.stop) for each in verify(checkpoint).damage if each.start is not None]

    local = Path(commit(job_of(tmp_path / "run", 7, image)).path)
    data, before = (local / ADAPTER).read_bytes(), read_manifest(local)
    stops = [5, (8 << 20) + 1, 9 << 20, len(data)]
    lines = [piece_line(stop, xxhash.xxh3_64_hexdigest(data[start:stop])) for start, stop in pairwise([0, *stops])]
    entry = FileEntry(len(data), pieces_xxh3_128=digest_of_pieces(lines))
    original = encode_manifest(msgspec.structs.replace(
        before, format=FORMAT_IN_PIECES, files={**before.files, ADAPTER: entry}, pieces={ADAPTER: lines}
    ))  # fmt: skip
    (local / MANIFEST_NAME).write_bytes(original)
    changes = {"documents": {}, "files": tuple(before.files), "original": original}
    there = location_of(put(url, 7, local, **changes))
    assert manifest_bytes(there / MANIFEST_NAME) == original
    assert placed(there) == placed(local) == []
    (local / ADAPTER).write_bytes(data[:6] + bytes([data[6] ^ 1]) + data[7:])
    assert placed(local) == [(5, (8 << 20) + 1)]
    with pytest.raises(CommitError, match="is not what its manifest says"):
        put(url, 8, local, **changes)


def test_a_whole_bucket_may_be_the_directory(weed: Weed, url: Url, image: Path) -> None:
    """There is no prefix: keys begin with the names of checkpoints."""
    weed.make_bucket("whole")
    whole = Url("s3://whole")
    ObjectStorage(whole).prepare()
    assert put(whole, 1, image) == "s3://whole/checkpoint-1"
    assert put(whole, 2, image) == "s3://whole/checkpoint-2"
    assert set(Objects(whole).walk("")) == {
        f"checkpoint-{step}/{name}" for step in (1, 2) for name in {*FILES, "async_ckpt.json"}
    }
    ObjectStorage(whole).retain(Policy(keep_last=1))
    assert str(latest("s3://whole")) == "s3://whole/checkpoint-2"
    assert [each.name for each in collect_objects(whole, Policy(), dry_run=False)] == []
    assert {path.partition("/")[0] for path in Objects(whole).walk("")} == {"checkpoint-2"}


def test_a_commit_that_this_run_has_made_already_counts(url: Url, image: Path) -> None:
    put(url, 1, image)
    again = ObjectStorage(url).commit_once(job_at(url, 1, image), lambda: True)
    assert (again.path, again.write_s) == (f"{url}/checkpoint-1", 0.0)
    assert [each.step for each in ObjectStorage(url).committed_by("run-1")] == [1]
    assert ObjectStorage(url).committed_by("run-2") == []
    assert ObjectStorage(url).newest() == (1, f"{url}/checkpoint-1")


def test_the_step_of_another_run_is_not_touched(url: Url, objects: Objects, image: Path) -> None:
    put(url, 1, image)
    before = objects.walk(url.key)
    with pytest.raises(AlreadyCommittedError, match="checkpoint-1 exists already"):
        put(url, 1, image, run="run-2")
    assert objects.walk(url.key) == before


def test_objects_of_another_program_are_not_touched(url: Url, objects: Objects, image: Path) -> None:
    objects.write((url / "checkpoint-1/optimizer.pt").key, b"theirs")
    with pytest.raises(AlreadyCommittedError, match=r"objects of another program \(optimizer.pt\)"):
        put(url, 1, image)
    assert below(objects, url) == {"checkpoint-1/optimizer.pt"}


def test_a_slot_that_was_taken_meanwhile_leaves_nothing(url: Url, objects: Objects, image: Path) -> None:
    with pytest.raises(CommitError, match="taken by another step"):
        ObjectStorage(url).commit_once(job_at(url, 1, image), lambda: False)
    assert below(objects, url) == set()
    assert latest(str(url)) is None


def test_a_manifest_that_appears_during_the_upload_is_not_replaced(url: Url, objects: Objects, image: Path) -> None:
    """Whatever became of the reservation: the last word is a creation that fails if there is one."""
    theirs = b"a manifest of somebody else"

    def in_the_meantime() -> bool:
        return objects.create((url / "checkpoint-1" / "async_ckpt.json").key, theirs)

    with pytest.raises(AlreadyCommittedError, match="exists already"):
        ObjectStorage(url).commit_once(job_at(url, 1, image), in_the_meantime)
    assert objects.read((url / "checkpoint-1" / "async_ckpt.json").key) == theirs


def test_a_file_that_vanishes_during_the_upload_fails_it(url: Url, objects: Objects, image: Path) -> None:
    def removed(name: str) -> None:
        if name == "write:README.md":
            objects.remove([(url / "checkpoint-1" / ADAPTER).key])

    with pytest.raises(CommitError, match="was changed by another program"):
        ObjectStorage(url).commit_once(job_at(url, 1, image), lambda: True, removed)
    assert below(objects, url) == set()


def test_two_savers_race_for_a_step_and_one_of_them_has_all_of_it(
    url: Url, objects: Objects, image: Path, tmp_path: Path
) -> None:
    """Runs of different content: the files and the manifest that stay are one run's."""
    images = {"a": image, "b": make_image(tmp_path / "other", adapter_bytes=(17 << 20) + 4097)}
    outcomes: dict[str, object] = {}
    ready = threading.Barrier(2)

    def race(run: str) -> None:
        ready.wait()
        try:
            outcomes[run] = put(url, 3, images[run], run=run)
        except CommitError as error:
            outcomes[run] = error

    threads = [threading.Thread(target=race, args=(run,)) for run in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [run for run, outcome in outcomes.items() if isinstance(outcome, str)]
    (loser,) = [outcome for outcome in outcomes.values() if not isinstance(outcome, str)]
    assert isinstance(loser, AlreadyCommittedError)
    found = read_manifest(url / "checkpoint-3")
    assert found.run == winner
    for name in (ADAPTER, STATE):
        data = objects.read((url / "checkpoint-3" / name).key)
        assert data == (images[winner] / name).read_bytes()
        assert xxhash.xxh3_128_hexdigest(data) == found.files[name].xxh3_128
    assert below(objects, url) == {f"checkpoint-3/{name}" for name in {*FILES, "async_ckpt.json"}}


def test_a_living_saver_of_another_host_is_waited_for_and_named(url: Url, objects: Objects, image: Path) -> None:
    """Its reservation holds, whatever its process number means here."""
    reservations = Reservations(objects, url)
    held = reservations.take(1, "run-2", "commit", 600.0, objects_attempts())
    elsewhere = msgspec.structs.replace(held.reservation, host="another")
    objects.write((url / ".async-ckpt/checkpoint-1").key, msgspec.json.encode(elsewhere))
    with pytest.raises(CommitError, match=r"reserved by another saver \(run run-2"):
        put(url, 1, image, timeout_s=1.5)
    assert below(objects, url) == {".async-ckpt/checkpoint-1"}


def objects_attempts() -> object:
    from async_ckpt.core.attempts import Attempts

    return Attempts(30.0)


def test_retention_keeps_what_the_rules_say(url: Url, objects: Objects, image: Path) -> None:
    """The losses are 1/step: the best two are the newest two."""
    for step in range(1, 6):
        put(url, step, image)
    ObjectStorage(url).retain(Policy())
    assert len(committed(str(url))) == 5
    ObjectStorage(url).retain(Policy(keep_last=1, keep_every=2, keep_best=("loss", "max", 1)))
    assert [step for step, _ in committed(str(url))] == [1, 2, 4, 5]
    assert {path.partition("/")[0] for path in below(objects, url)} == {f"checkpoint-{step}" for step in (1, 2, 4, 5)}


def test_gc_rehearses_and_removes(url: Url, objects: Objects, image: Path) -> None:
    for step in (1, 2):
        put(url, step, image)
    rehearsal = collect_objects(url, Policy(keep_last=1), dry_run=True)
    assert [(each.name, each.done) for each in rehearsal] == [("checkpoint-1", False)]
    assert len(committed(str(url))) == 2
    done = collect_objects(url, Policy(keep_last=1), dry_run=False)
    assert [(each.name, each.done) for each in done] == [("checkpoint-1", True)]
    assert done[0].bytes == read_manifest(url / "checkpoint-2").total_bytes
    with pytest.raises(CheckpointError, match="there is nothing at"):
        collect_objects(url / "nowhere", Policy(), dry_run=False)
