"""A commit that dies before each of its requests, and after each, when the store has done it and nobody has heard."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import xxhash

from async_ckpt.core.attempts import Attempts
from async_ckpt.core.location import Url
from async_ckpt.core.manifest import MANIFEST_NAME, committed, read_manifest
from async_ckpt.core.objects import Objects
from async_ckpt.core.processes import process_of
from async_ckpt_saver.object_collection import unfinished_uploads
from async_ckpt_saver.object_storage import ObjectStorage
from async_ckpt_saver.reservation import Reservations
from tests.cloud.test_object_storage import FILES, put
from tests.saver.committing import make_image

_MANY = 60  # requests that no commit of these files makes


class Killed(BaseException):
    """From its first raising on the process sends nothing any more."""


def dying(monkeypatch: pytest.MonkeyPatch, at: int, when: Literal["before", "after"]) -> list[str]:
    """The `at`-th request (from 0) is the last; returns what was asked for so far."""
    asked: list[str] = []
    run = Attempts.run

    def counted(self: Attempts, what: str, work: Callable[[], Any]) -> Any:
        number = len(asked)
        asked.append(what)
        if number > at or (number == at and when == "before"):
            raise Killed
        found = run(self, what, work)
        if number == at:
            raise Killed
        return found

    monkeypatch.setattr(Attempts, "run", counted)
    return asked


def assert_whole_or_nothing(url: Url, objects: Objects, image: Path) -> bool:
    """Whether it is there. `image` says what it has to be."""
    steps = [step for step, _ in committed(url)]
    if not steps:
        assert MANIFEST_NAME not in objects.walk((url / "checkpoint-1").key)
        return False
    assert steps == [1]
    found = read_manifest(url / "checkpoint-1")
    assert set(found.files) == FILES
    for name, entry in found.files.items():
        data = objects.read((url / "checkpoint-1" / name).key)
        assert xxhash.xxh3_128_hexdigest(data) == entry.xxh3_128
        if (image / name).exists():
            assert data == (image / name).read_bytes()
    return True


def dead_process() -> Any:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        return process_of(process.pid)


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.full), "after"])
@pytest.mark.parametrize("follower", ["the same run", "another job"])
def test_whenever_it_dies(
    url: Url,
    objects: Objects,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: Literal["before", "after"],
    follower: str,
) -> None:
    image = make_image(tmp_path / "image", adapter_bytes=(8 << 20) + 4097)  # two parts
    dead = dead_process()
    died, seen = 0, 0
    for at in range(_MANY):
        there = url / str(at)
        with monkeypatch.context() as patch:
            asked = dying(patch, at, when)
            try:
                put(there, 1, image)
            except Killed:
                died += 1
        if len(asked) <= at:
            break  # it had come to its end before
        visible = assert_whole_or_nothing(there, objects, image)
        seen += visible
        if follower == "the same run":
            assert put(there, 1, image) == f"{there}/checkpoint-1", asked[at]
        else:
            left = Reservations(objects, there).look(1)
            if left is not None:
                gone = msgspec.structs.replace(left[0], process=dead)
                objects.write((there / ".async-ckpt/checkpoint-1").key, msgspec.json.encode(gone))
            ObjectStorage(there).prepare()
            assert assert_whole_or_nothing(there, objects, image) == visible, asked[at]
            if not visible:
                assert objects.walk(there.key) == {}, asked[at]
                assert put(there, 1, image, run="another") == f"{there}/checkpoint-1"
        assert assert_whole_or_nothing(there, objects, image)
        assert {path.partition("/")[0] for path in objects.walk(there.key)} == {"checkpoint-1"}, asked[at]
        assert unfinished_uploads(objects, there) == [], asked[at]
    else:
        raise AssertionError(f"it never ended: {asked}")
    assert died == at
    assert died > 8
    assert 0 < seen < died
