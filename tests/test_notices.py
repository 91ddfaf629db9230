"""Signals as notices: who is called, and when the process still ends of them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from async_ckpt import CheckpointError, attach, notices
from async_ckpt.notices import Notices

USR1, TERM = signal.SIGUSR1, signal.SIGTERM


@pytest.fixture
def calls() -> Iterator[list[int]]:
    """Signals that came to a handler which was there before ours."""
    came: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, handler) for number in (USR1, TERM)}
    yield came
    for number, previous in before.items():
        signal.signal(number, previous)


def test_a_notice_is_told_and_passed_on(calls: list[int]) -> None:
    told: list[None] = []
    notice = Notices(lambda: told.append(None))
    assert notice.received is None
    signal.raise_signal(USR1)
    assert (len(told), calls, notice.received) == (1, [USR1], "SIGUSR1")
    notice.close()
    signal.raise_signal(USR1)
    assert (len(told), calls) == (1, [USR1, USR1])


def test_the_same_signal_much_later_acts_as_before(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones within 5 s are one notice: an agent passes on what a service manager had sent to all."""
    told: list[None] = []
    notice = Notices(lambda: told.append(None))
    now_s = [100.0]
    monkeypatch.setattr(notices.time, "monotonic", lambda: now_s[0])
    signal.raise_signal(TERM)
    now_s[0] += 4.9
    signal.raise_signal(TERM)
    assert (len(told), len(calls)) == (2, 2)
    now_s[0] += 0.2
    signal.raise_signal(USR1)  # its first one
    assert len(told) == 3
    signal.raise_signal(TERM)
    assert (len(told), len(calls)) == (3, 4)
    notice.close()


def status_of_child(number: int, *, default: bool, later: bool = False, closed: bool = False) -> int:
    """How a forked process ends that sends itself `number`: in the end with status 7 if the signal did nothing."""
    pid = os.fork()
    if pid == 0:
        try:
            for each in (USR1, TERM):
                signal.signal(each, signal.SIG_DFL if default else signal.SIG_IGN)
            notice = Notices(lambda: None)
            if closed:
                notice.close()
            if later:
                signal.raise_signal(number)
                notice._first_s[number] -= 60
            signal.raise_signal(number)
            os._exit(7)
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("number", [USR1, TERM])
def test_whoever_insists_ends_the_process(number: int) -> None:
    assert status_of_child(number, default=True) == 7
    assert status_of_child(number, default=True, later=True) == -number
    assert status_of_child(number, default=True, closed=True) == -number
    assert status_of_child(number, default=False, later=True) == 7


def test_a_forked_worker_ends_of_sigterm_and_outlives_slurms_notice() -> None:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (USR1, TERM)}
    notice = Notices(lambda: None)
    try:
        for number, status in ((TERM, -TERM), (USR1, 7)):
            pid = os.fork()
            if pid == 0:
                signal.raise_signal(number)
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
        assert notice.received is None
    finally:
        notice.close()
        for number, previous in before.items():
            signal.signal(number, previous)


def test_only_the_main_thread_may_ask_for_it() -> None:
    failures: list[str] = []

    def elsewhere() -> None:
        try:
            attach(None, preemption=True)  # type: ignore[arg-type]
        except CheckpointError as error:
            failures.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(failures) == 1
    assert "main thread" in failures[0]


def test_a_handler_installed_over_ours_stays(calls: list[int]) -> None:
    notice = Notices(lambda: None)
    over = signal.getsignal(USR1)
    signal.signal(USR1, lambda number, frame: over(number, frame))  # type: ignore[operator, misc]
    mine = signal.getsignal(USR1)
    notice.close()
    assert signal.getsignal(USR1) is mine
    signal.raise_signal(USR1)
    assert calls == [USR1]
