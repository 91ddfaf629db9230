"""The queue of uploads, every order of calls: newest first, no backlog, nothing removed before it was copied."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from async_ckpt_saver.uploads import Ended, Uploads

WANTED = {2, 3}  # by keep_every or keep_best
CALLS = ("add", "trim", "begin", "done", "failed", "gone", "compared")


class Model:
    """What has to hold after each call, from what was called: told nothing by the queue but what it answers."""

    def __init__(self) -> None:
        self.queue = Uploads()
        self.committed: list[int] = []
        self.ended: dict[int, Ended] = {}
        self.uploading: int | None = None

    def calls(self) -> Iterator[str]:
        for call in CALLS:
            if call in ("done", "failed", "gone") and self.uploading is None:
                continue
            yield call

    def call(self, name: str) -> None:
        queue, before = self.queue, self.queue.held
        if name == "add":
            step = len(self.committed) + 1
            self.committed.append(step)
            queue.add(step)
            again = {each for each, ended in self.ended.items() if ended.outcome == "failed"}
            for each in again:
                del self.ended[each]
            assert queue.held == before | {step} | again
        elif name == "trim":
            dropped = queue.trim(WANTED)
            for each in dropped:
                assert each.outcome == "dropped"
                assert each.step not in WANTED
                assert each.step < max(queue.queued)
                self.ended[each.step] = each
            assert queue.held == before - {each.step for each in dropped}
            assert len([step for step in queue.queued if step not in WANTED]) <= 1
        elif name == "begin":
            step_or_none = queue.begin()
            if self.uploading is not None or not before:
                assert step_or_none is None
            else:
                assert step_or_none == max(before)
                self.uploading = step_or_none
            assert queue.held == before
        elif name == "compared":  # the second tier has the first one, whatever was told of it
            there = [step for step in self.committed[:1] if step != self.uploading]
            queue.compared(there, [step for step in self.committed if step not in there])
            self.ended = {step: Ended(step, "uploaded") for step in there}
            assert queue.held == set(self.committed) - {*there}
        else:
            assert self.uploading is not None
            ended = queue.done() if name == "done" else queue.failed("why") if name == "failed" else queue.gone("why")
            assert ended.step == self.uploading
            self.ended[ended.step] = ended
            self.uploading = None
            assert queue.held == before - {ended.step}
        self.check()

    def check(self) -> None:
        queue = self.queue
        assert queue.uploading == self.uploading
        assert queue.queued == sorted(queue.queued, reverse=True)
        assert queue.held == {*queue.queued, *([self.uploading] if self.uploading is not None else [])}
        assert len(queue.held) == len(queue.queued) + (self.uploading is not None)
        assert queue.idle == (not queue.held)
        for step in self.committed:
            told = self.ended.get(step)
            assert (step in queue.held) == (told is None), step  # no step is forgotten, none is two things
            found = queue.ended(step)
            assert (None if found is None else found.outcome) == (None if told is None else told.outcome), step
        if self.committed:  # the newest is dropped only if it is not there to be copied
            last = self.ended.get(self.committed[-1])
            assert last is None or last.outcome != "dropped" or last.reason == "why"


def test_every_order_of_calls() -> None:
    depth = 7
    runs = 0
    orders = [tuple[str, ...]()]
    while orders:
        order = orders.pop()
        model = Model()
        for name in order:
            model.call(name)
        if len(order) == depth:
            runs += 1
            continue
        orders += [(*order, name) for name in model.calls()]
    assert runs > 30_000


@pytest.mark.parametrize("failures", list(itertools.product((False, True), repeat=3)))
def test_everything_that_is_wanted_and_the_newest_arrive_when_the_store_is_back(failures: tuple[bool, ...]) -> None:
    queue = Uploads()
    for step, fails in enumerate(failures, 1):
        queue.add(step)
        queue.trim(WANTED)
        if queue.begin() is not None:
            if fails:
                queue.failed("down")
            else:
                queue.done()
    queue.add(4)
    queue.trim(WANTED)
    order = []
    while (step_or_none := queue.begin()) is not None:
        order.append(step_or_none)
        queue.done()
    assert order == sorted(order, reverse=True)
    assert order[0] == 4
    for step in (2, 3, 4):
        assert queue.ended(step) == Ended(step, "uploaded")
    first = queue.ended(1)
    assert first is not None
    assert first.outcome == ("dropped" if failures[0] else "uploaded")
    assert queue.idle


def test_a_slow_store_gets_the_newest_and_what_is_wanted() -> None:
    """The first is on its way while five more are committed."""
    queue = Uploads()
    queue.add(1)
    assert queue.begin() == 1
    for step in range(2, 7):
        queue.add(step)
        queue.trim(WANTED)
        assert len(queue.held) <= 2 + len(WANTED)
    assert queue.queued == [6, 3, 2]
    assert queue.held == {1, 2, 3, 6}
    assert queue.ended(5) == Ended(5, "dropped", "step 6 was committed before its upload began")
    assert queue.done() == Ended(1, "uploaded")
    assert queue.begin() == 6


def test_what_was_not_uploaded_is_remembered_for_a_while() -> None:
    queue = Uploads()
    for step in range(100):
        queue.add(step)
        queue.trim(())
    assert queue.queued == [99]
    assert [step for step in range(99) if queue.ended(step) is not None] == list(range(35, 99))


def test_no_upload_ends_that_was_not_begun() -> None:
    queue = Uploads()
    queue.add(1)
    for end in (queue.done, lambda: queue.failed(""), lambda: queue.gone("")):
        with pytest.raises(ValueError, match="no upload is under way"):
            end()
