from __future__ import annotations

import errno

import pytest

from async_ckpt.core.protocol import Failed, Settled, Skipped, Staged
from async_ckpt_saver.run import Run
from async_ckpt_saver.status import REMEMBERED_SAVES, Chronicle, SaverStatus, decode_status, encode_status
from async_ckpt_saver.writer import CommitError


class Clock:
    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        self.s += 1.0
        return self.s


class Told:
    """A state machine and its chronicle, wired as `LiveRun` wires them."""

    def __init__(self, world: int = 2) -> None:
        self.machine = Run(world)
        self.chronicle = Chronicle(Clock(), world)

    def say(self, rank: int, message: Staged | Skipped | Failed) -> None:
        self.chronicle.heard(rank, message)
        report = {Staged: "staged", Skipped: "skipped", Failed: "failed"}[type(message)]
        self.do(self.machine.report(rank, message.slot, message.step, report, ""))  # type: ignore[arg-type]

    def do(self, actions: list) -> None:  # type: ignore[type-arg]
        for action in actions:
            self.chronicle.note(action)


def staged(step: int, copy_s: float = 0.5) -> Staged:
    return Staged(seq=1, slot=step % 2, step=step, copy_s=copy_s)


def test_the_time_line_of_a_save() -> None:
    told = Told()
    told.say(0, staged(1, 0.25))
    told.say(0, staged(1, 9.0))  # said twice: the first counts
    told.say(1, staged(1, 0.5))
    [save] = told.chronicle.saves
    assert (save.settled_s, save.settled) == (None, None)
    told.do(told.machine.commit_done(1, Settled(step=1, slot=1, outcome="committed", bytes=7, write_s=0.1)))
    assert save.settled_s is not None
    assert save.write_started_s is not None
    assert [(rank, copy_s) for rank, _, copy_s, _ in save.staged] == [(0, 0.25), (1, 0.5)]
    order = [save.started_s, *(at_s for _, at_s, _, _ in save.staged), save.write_started_s, save.settled_s]
    assert sorted(order) == order
    assert (told.chronicle.committed, told.chronicle.committed_bytes, told.chronicle.failures) == (1, 7, {})
    assert told.chronicle.last_commit_s == save.settled_s


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (CommitError("full", errno.ENOSPC), "enospc"),
        (OSError(errno.EIO, "broken"), "eio"),
        (CommitError("replicas have diverged"), "commit_failed"),
        (ValueError("a bug"), "commit_failed"),
    ],
)
def test_a_commit_that_fails_is_counted_by_its_error(error: Exception, cause: str) -> None:
    told = Told(1)
    told.say(0, staged(1))
    told.chronicle.commit_failed(1, error)
    told.do(told.machine.commit_failed(1, str(error)))
    assert told.chronicle.failures == {cause: 1}
    assert told.chronicle.last_error == f"step 1 failed: {error}"
    assert told.chronicle.last_commit_s is None
    assert [save.cause for save in told.chronicle.saves] == [cause]


def test_what_ranks_did_not_stage_is_counted_by_what_they_said() -> None:
    told = Told()
    told.say(0, Skipped(seq=1, slot=1, step=1, reason="busy"))
    told.say(1, Skipped(seq=1, slot=1, step=1, reason="busy"))  # the other rank says so as well: one save
    told.say(0, Failed(seq=2, slot=0, step=2, reason="copy"))
    told.say(1, staged(2))
    told.say(0, staged(3))
    told.do(told.machine.leave(1, "died"))
    assert told.chronicle.failures == {"slot_busy": 1, "copy_failed": 1, "incomplete": 1}
    assert [save.cause for save in told.chronicle.saves] == ["slot_busy", "copy_failed", "incomplete"]
    assert told.chronicle.last_error == "step 3 failed: rank 1 of 2 died before it had staged"


def test_memory_is_bounded_and_counts_are_not() -> None:
    told = Told(1)
    for step in range(1, 1001):
        told.say(0, staged(step))
        told.do(told.machine.commit_done(step, Settled(step=step, slot=0, outcome="committed", bytes=1)))
    assert len(told.chronicle.saves) == REMEMBERED_SAVES
    assert [save.step for save in told.chronicle.saves][-1] == 1000
    assert (told.chronicle.committed, told.chronicle.committed_bytes) == (1000, 1000)


def test_the_report_survives_its_journey() -> None:
    status = SaverStatus(
        pid=1, version="v", endpoint="e", root="r", incarnation="i", uptime_s=1.0, rss_bytes=2,
        rejected_messages={"unreadable": 3}, now_unix_s=4.0, runs=[], ended=[],
    )  # fmt: skip
    assert decode_status(encode_status(status)) == status


def test_a_step_of_before_is_told_again_and_not_shown_as_open() -> None:
    """As after a restart of the saver, to which a rank repeats what it had said to the one before."""
    told = Told()
    told.machine.know(Settled(step=1, slot=1, outcome="committed"))
    told.say(0, staged(1))
    assert [save.step for save in told.chronicle.saves] == []
    told.say(0, staged(2))
    assert [save.step for save in told.chronicle.saves] == [2]
