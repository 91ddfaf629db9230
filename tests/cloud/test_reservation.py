"""Who may touch the objects of a step: one at a time, and who has given up is seen, by no clock of ours."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from async_ckpt.core.attempts import Attempts
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Url
from async_ckpt.core.manifest import committed, latest
from async_ckpt.core.objects import Objects
from async_ckpt.core.processes import process_of
from async_ckpt.core.retention_policy import Policy
from async_ckpt_saver.object_collection import collect_objects, remove_step
from async_ckpt_saver.object_storage import ObjectStorage
from async_ckpt_saver.reservation import Held, Reservation, Reservations
from tests.cloud.test_object_storage import put
from tests.saver.committing import make_image


@pytest.fixture
def reservations(objects: Objects, url: Url) -> Reservations:
    return Reservations(objects, url)


def take(reservations: Reservations, run: str = "run-1", timeout_s: float = 0.0) -> Held:
    return reservations.take(5, run, "commit", 600.0, Attempts(timeout_s))


def changed(reservations: Reservations, objects: Objects, url: Url, **changes: object) -> Reservation:
    """One that somebody else has left there."""
    held = take(reservations, "other", 30.0)
    found = msgspec.structs.replace(held.reservation, **changes)
    objects.write((url / ".async-ckpt/checkpoint-5").key, msgspec.json.encode(found))
    return found


def dead_process() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.DEVNULL)


def test_one_of_many_gets_it(reservations: Reservations) -> None:
    ready = threading.Barrier(6)
    held: list[Held] = []
    refused: list[CheckpointError] = []

    def race(number: int) -> None:
        ready.wait()
        try:
            held.append(take(reservations, f"run-{number}", 0.0))
        except CheckpointError as error:
            refused.append(error)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)
    assert all(held[0].reservation.run in str(error) for error in refused)
    reservations.release(held[0])
    assert reservations.steps() == []


def test_the_same_run_takes_it_over(reservations: Reservations) -> None:
    assert take(reservations).fresh
    assert not take(reservations).fresh


def test_a_removal_is_not_gone_on_with_by_a_commit_of_the_same_name(reservations: Reservations) -> None:
    reservations.take(5, "run-1", "removal", 600.0, Attempts(30.0))
    with pytest.raises(CheckpointError, match="reserved by another saver"):
        take(reservations)


def test_a_dead_process_of_this_host_holds_nothing(reservations: Reservations, objects: Objects, url: Url) -> None:
    process = dead_process()
    identity = process_of(process.pid)
    process.wait()
    changed(reservations, objects, url, process=identity)
    assert not take(reservations).fresh


@pytest.mark.parametrize("elsewhere", ["host", "namespace"])
def test_a_dead_process_that_may_live_elsewhere_holds_it(
    reservations: Reservations, objects: Objects, url: Url, elsewhere: str
) -> None:
    process = dead_process()
    identity = process_of(process.pid)
    process.wait()
    if elsewhere == "host":
        changed(reservations, objects, url, process=identity, host="another boot")
    else:
        changed(reservations, objects, url, process=msgspec.structs.replace(identity, pid_namespace="pid:[1]"))
    with pytest.raises(CheckpointError, match="it is free at most 720 s after it began"):
        take(reservations)


def test_time_is_that_of_the_store(
    reservations: Reservations, objects: Objects, url: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is ten years ahead. What ran out for the store is free, what did not is not."""
    changed(reservations, objects, url, host="another boot")
    monkeypatch.setattr("time.time", lambda: 2_100_000_000.0)
    with pytest.raises(CheckpointError, match="reserved by another saver"):
        take(reservations)
    found = reservations.look(5)
    assert found is not None
    objects.write(
        (url / ".async-ckpt/checkpoint-5").key, msgspec.json.encode(msgspec.structs.replace(found[0], lease_s=-200.0))
    )
    assert not take(reservations).fresh


def test_one_that_was_lost_is_not_given_back(reservations: Reservations, objects: Objects, url: Url) -> None:
    """Its time was over, and another has it: who held it before must not take it away."""
    held = take(reservations)
    theirs = changed_by_another(objects, url, held)
    reservations.release(msgspec.structs.replace(held, until_s=0.0))
    found = reservations.look(5)
    assert found is not None
    assert found[0] == theirs


def changed_by_another(objects: Objects, url: Url, held: Held) -> Reservation:
    theirs = msgspec.structs.replace(held.reservation, run="other", nonce="other")
    objects.write((url / ".async-ckpt/checkpoint-5").key, msgspec.json.encode(theirs))
    return theirs


def test_what_is_none_of_ours_is_named(reservations: Reservations, objects: Objects, url: Url) -> None:
    objects.write((url / ".async-ckpt/checkpoint-5").key, b"hello")
    with pytest.raises(CheckpointError, match=r"\.async-ckpt/checkpoint-5 was not made by async_ckpt"):
        take(reservations)


def test_a_store_that_contradicts_itself_holds_up_nobody(
    reservations: Reservations, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that the object is there, and that it is not."""
    asked: list[str] = []

    def there(self: Objects, key: str, data: bytes) -> bool:
        asked.append(key)
        return False

    monkeypatch.setattr(Objects, "create", there)
    with pytest.raises(CheckpointError, match="is taken and free in turns"):
        take(reservations)
    assert 1 <= len(asked) < 10


class Killed(BaseException):
    """What a kill looks like from inside."""


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(
    url: Url, objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its removals: the checkpoint is whole or cannot be seen, and the next sweep ends what was begun."""
    image = make_image(tmp_path / "image", adapter_bytes=5000)
    remove = Objects.remove
    for killed_at in (1, 2, 3, 4):
        put(url, 1, image)
        put(url, 2, image)
        calls = 0

        def killed(self: Objects, keys: list[str], killed_at: int = killed_at) -> None:
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise Killed
            remove(self, keys)

        monkeypatch.setattr(Objects, "remove", killed)
        try:
            remove_step(objects, url, 1, Attempts(30.0))
        except Killed:
            assert killed_at <= 3
        else:
            assert killed_at == 4
        monkeypatch.setattr(Objects, "remove", remove)
        assert [step for step, _ in committed(url)] == ([1, 2] if killed_at == 1 else [2])
        process = dead_process()
        identity = process_of(process.pid)
        process.wait()
        found = Reservations(objects, url).look(1)
        if found is not None:  # as after a kill: the process that made it is no more
            left = msgspec.structs.replace(found[0], process=identity)
            objects.write((url / ".async-ckpt/checkpoint-1").key, msgspec.json.encode(left))
        ObjectStorage(url).sweep()
        assert {path.partition("/")[0] for path in objects.walk(url.key)} == {"checkpoint-2"}
        assert str(latest(url)) == f"{url}/checkpoint-2"
        collect_objects(url, Policy(keep_last=1), dry_run=False)
        remove_step(objects, url, 2, Attempts(30.0))
