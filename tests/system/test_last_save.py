"""The save that a notice asks for, on one rank: it is made once, and only if nothing went wrong."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.system.processes import run_cases, the_saver, until
from tests.system.training import Checkpointer, adamw, attach, refusal, step, wrapped


def told(ckpt: Checkpointer) -> None:
    """Signal this process, and return when the agreement has been heard."""
    os.kill(os.getpid(), signal.SIGTERM)
    until(lambda: ckpt._preemption._stand.stop is not None, "the agreement")  # type: ignore[union-attr]


def a_full_slot_is_waited_for(folder: Path) -> None:
    """`when_busy="skip"` skips any other save."""
    model = wrapped("plain")
    optimizer = adamw(model)
    with attach(model, optimizer, directory=folder, preemption=True, slots=1, when_busy="skip") as ckpt:
        saver = the_saver(folder)
        step(model, optimizer)
        told(ckpt)
        os.kill(saver, signal.SIGSTOP)
        first = ckpt.save(0)
        assert ckpt.save(1).state == "skipped"
        step(model, optimizer)
        threading.Timer(0.5, os.kill, (saver, signal.SIGCONT)).start()
        last = ckpt.save(2)
        assert ckpt.preempted
        assert (first.state, last.wait()) == ("committed", folder / "checkpoint-2")


def what_was_saved_for_the_user_is_not_saved_again(folder: Path) -> None:
    model = wrapped("plain")
    optimizer = adamw(model)
    with attach(model, optimizer, directory=folder, preemption=True) as ckpt:
        for _ in range(3):
            step(model, optimizer)
        told(ckpt)
        assert not ckpt.preempted
        step(model, optimizer)
        assert ckpt.preempted
        ckpt.wait()
        assert sorted(os.listdir(folder)) == ["checkpoint-3", "latest"]
        handle = ckpt.save(2)  # the user counts otherwise than was inferred
        assert (handle.step, handle.state) == (3, "committed")
        assert "steps must grow" in refusal(lambda: ckpt.save(2))
        step(model, optimizer)
        assert ckpt.save(3).state == "skipped"
        assert ckpt.save(5).wait() == folder / "checkpoint-5"
        assert ckpt.stats()["committed"] == 2
    assert sorted(os.listdir(folder)) == ["checkpoint-3", "checkpoint-5", "latest"]


def what_the_user_saved_is_not_saved_again(folder: Path) -> None:
    model = wrapped("plain")
    optimizer = adamw(model)
    with attach(model, optimizer, directory=folder, preemption=True) as ckpt:
        step(model, optimizer)
        told(ckpt)
        step(model, optimizer)
        ckpt.save(40)
        assert ckpt.preempted
        step(model, optimizer)
    assert sorted(os.listdir(folder)) == ["checkpoint-40", "latest"]


def an_error_saves_nothing(folder: Path) -> None:
    model = wrapped("plain")
    optimizer = adamw(model)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with attach(model, optimizer, directory=folder, preemption=True) as ckpt:
            told(ckpt)
            step(model, optimizer)
            assert ckpt.preempted
            raise KeyError
    except KeyError:
        assert os.listdir(folder) == []
    assert signal.getsignal(signal.SIGTERM) == before


def without_the_option_nothing_is_handled(folder: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with attach(wrapped("plain"), directory=folder) as ckpt:
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
        assert not ckpt.preempted


CASES = {
    case.__name__: case
    for case in (
        a_full_slot_is_waited_for,
        what_was_saved_for_the_user_is_not_saved_again,
        what_the_user_saved_is_not_saved_again,
        an_error_saves_nothing,
        without_the_option_nothing_is_handled,
    )
}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("case", CASES)
def test_last_save(results: dict[str, str], folder: Path, case: str) -> None:
    if not results:
        results.update(run_cases("tests.system.test_last_save", list(CASES), 1, folder))
    if results[case]:
        pytest.fail(results[case], pytrace=False)
