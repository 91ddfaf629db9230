"""Which of two tiers a run goes on from, and what happens where the second one does not answer."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.object_errors import ObjectError
from async_ckpt_saver.roots import Roots
from async_ckpt_saver.tiers import Tiers


class Place:
    """As much of a storage as is asked."""

    directory = "s3://bucket/run"
    far = True

    def __init__(self, newest: int | None = None, answer: Callable[[], None] = lambda: None) -> None:
        self._newest, self._answer = newest, answer

    def prepare(self) -> Callable[[], None]:
        self._answer()
        return lambda: None

    def newest(self) -> tuple[int, str] | None:
        self._answer()
        return None if self._newest is None else (self._newest, f"{self.directory}/checkpoint-{self._newest}")


class First(Place):
    directory = "/local"

    def __init__(self, newest: int | None = None) -> None:
        super().__init__(newest)
        self.undone = 0

    def prepare(self) -> Callable[[], None]:
        def undo() -> None:
            self.undone += 1

        return undo


def tiers(first: First, second: Place | None, tmp_path: Path, timeout_s: float = 60.0) -> Tiers:
    made = Tiers(Roots([tmp_path]), str(tmp_path / "run"), "", timeout_s)
    made.first, made.second = first, second  # type: ignore[assignment]
    return made


def failing(error: BaseException) -> Callable[[], None]:
    def answer() -> None:
        raise error

    return answer


@pytest.mark.parametrize(("here", "there", "expected"), [
    (None, None, None),
    (3, None, "/local/checkpoint-3"),
    (None, 3, "s3://bucket/run/checkpoint-3"),
    (3, 3, "/local/checkpoint-3"),
    (3, 4, "s3://bucket/run/checkpoint-4"),
    (4, 3, "/local/checkpoint-4"),
])  # fmt: skip
def test_the_newest_of_both_and_of_equal_ones_that_of_this_host(
    here: int | None, there: int | None, expected: str | None, tmp_path: Path
) -> None:
    found = tiers(First(here), Place(there), tmp_path).newest()
    assert (None if found is None else found[1]) == expected


def test_without_a_second_tier_the_first_is_all(tmp_path: Path) -> None:
    one = tiers(First(3), None, tmp_path)
    assert one.newest() == (3, "/local/checkpoint-3")
    one.prepare()()
    assert one.first.undone == 1  # type: ignore[attr-defined]


_OUTAGE = ObjectError("cannot be reached", code=errno.EIO)
_FULL = ObjectError("is full", code=errno.ENOSPC)


@pytest.mark.parametrize("outage", [_OUTAGE, _FULL])
def test_an_outage_keeps_no_job_from_what_lies_here(
    outage: ObjectError, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = tiers(First(3), Place(4, failing(outage)), tmp_path)
    made.prepare()
    assert made.newest() == (3, "/local/checkpoint-3")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all("goes on from /local/checkpoint-3, and there may be a newer one in s3://bucket/run" in each
               for each in said)  # fmt: skip


def test_with_nothing_here_an_outage_is_an_error_since_there_may_be_checkpoints(tmp_path: Path) -> None:
    first = First()
    made = tiers(first, Place(4, failing(_OUTAGE)), tmp_path)
    for ask in (made.prepare, made.newest):
        with pytest.raises(CheckpointError, match="cannot be reached"):
            ask()
    assert first.undone == 1


@pytest.mark.parametrize("mistake", [
    ObjectError("no such bucket", code=errno.ENOENT),
    ObjectError("not accepted", code=errno.EACCES),
    CheckpointError("cannot write to /mnt"),
])  # fmt: skip
def test_a_mistake_is_told_whatever_lies_here(mistake: CheckpointError, tmp_path: Path) -> None:
    first = First(3)
    with pytest.raises(CheckpointError) as raised:
        tiers(first, Place(4, failing(mistake)), tmp_path).prepare()
    assert raised.value is mistake
    assert first.undone == 1


def test_a_second_tier_that_hangs_is_not_waited_for_longer_than_ranks_would(tmp_path: Path) -> None:
    going: Any = threading.Event()
    hanging = Place(4, lambda: going.wait() and None)
    made = tiers(First(3), hanging, tmp_path, timeout_s=0.2)
    assert made.newest() == (3, "/local/checkpoint-3")
    with pytest.raises(CheckpointError, match=r"s3://bucket/run does not answer within 0\.05 s"):
        tiers(First(), hanging, tmp_path, timeout_s=0.2).newest()
    going.set()
