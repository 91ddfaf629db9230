"""What the saver notes of a step, told to rank 0 once it can be reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, pairwise

import pytest

from async_ckpt.core.limits import MAX_SPANS
from async_ckpt.core.protocol import Span, Traced, decode_from_saver, encode
from async_ckpt_saver.tracing import RunTrace, StepTrace


def ticking() -> Callable[[], int]:
    ticks: Iterator[int] = count()
    return lambda: next(ticks)


def committed(step: StepTrace, *points: str) -> None:
    with step.committing():
        for point in points:
            step.mark(point)


def test_spans_follow_each_other_and_lie_within_the_commit() -> None:
    step = StepTrace(ticking())
    step.staged(0)
    step.staged(1)
    step.staged(0)  # said again
    committed(step, "mkdir", "write:a", "chunk:a", "chunk:a", "fsync:a", "manifest", "fsync:async_ckpt.json",
              "fsync-directory:b", "fsync-directory:.", "rename", "fsync-parent", "latest", "latest-replace",
              "fsync-latest", "done")  # fmt: skip
    with step.retaining():
        pass
    assert step.outcome == "committed"
    gather, queued, commit, *within = step.spans
    assert (gather, queued) == (Span("gather", 0, 2), Span("queued", 2, 3))
    retention = within.pop()
    assert retention.name == "retention"
    assert [span.name for span in within] == [
        "prepare", "write a", "fsync a", "manifest", "fsync directories", "rename", "fsync parent", "latest",
    ]  # fmt: skip
    assert within[0].start_ns >= commit.start_ns
    assert all(before.stop_ns == after.start_ns for before, after in pairwise(within))
    assert within[-1].stop_ns < commit.stop_ns < retention.start_ns < retention.stop_ns


def test_a_commit_that_fails_ends_where_it_failed() -> None:
    step = StepTrace(ticking())
    step.staged(0)

    def fail() -> None:
        with step.committing():
            step.mark("write:a")
            raise OSError(5, "broken")

    with pytest.raises(OSError, match="broken"):
        fail()
    step.staged(1)  # a report that comes late moves nothing
    assert step.outcome == "failed"
    assert [span.name for span in step.spans] == ["gather", "queued", "commit", "write a"]
    assert step.spans[0].stop_ns == step.spans[1].start_ns


def test_a_checkpoint_of_very_many_files_still_fits_into_a_message() -> None:
    step = StepTrace(ticking())
    committed(step, *(f"write:{number}" for number in range(2 * MAX_SPANS)), "rename")
    assert len(step.spans) == MAX_SPANS
    assert (step.spans[0].name, step.spans[-1].name) == ("gather", "rename")
    told: list[Traced] = []
    run = RunTrace(told.append)
    run._steps[3] = step
    run.heard()
    run.done(3)
    assert decode_from_saver(encode(told[0])) == told[0]


def test_nothing_is_said_to_a_rank_that_cannot_be_reached_yet() -> None:
    told: list[Traced] = []
    run = RunTrace(told.append)
    for step in (1, 2):
        committed(run.step(step), "rename")
        run.done(step)
    assert told == []
    run.heard()
    run.heard()
    committed(run.step(3), "rename")
    run.done(3)
    assert [traced.step for traced in told] == [1, 2, 3]


def test_steps_that_are_never_committed_are_forgotten() -> None:
    run = RunTrace(lambda traced: None)
    for step in range(1000):
        run.step(step).staged(0)
    assert len(run._steps) == 64
