"""The saver's clock against a clock of our own."""

from __future__ import annotations

import asyncio
import os

from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import Process
from async_ckpt_saver.clock import RunningClock
from async_ckpt_saver.watch import ProcessWatch


class Time:
    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


def test_it_stands_still_during_a_pause() -> None:
    time = Time()
    clock = RunningClock(time)
    begin_s = clock.now_s()
    for _ in range(10):
        time.s += 0.5
        clock.tick()
    assert clock.now_s() == begin_s + 5
    time.s += 3600
    assert clock.now_s() == begin_s + 7  # asked before the first tick after the pause
    clock.tick()
    assert clock.now_s() == begin_s + 7
    time.s += 0.5
    assert clock.now_s() == begin_s + 7.5


@given(st.lists(st.tuples(st.floats(0, 1000), st.booleans())))
def test_it_never_goes_back_and_never_faster_than_time(moves: list[tuple[float, bool]]) -> None:
    time = Time()
    clock = RunningClock(time)
    before_s = clock.now_s()
    for seconds, ticks in moves:
        time.s += seconds
        if ticks:
            clock.tick()
        assert before_s - 1e-6 <= clock.now_s() <= before_s + seconds + 1e-6
        before_s = clock.now_s()


def test_a_pause_of_the_saver_gives_up_no_rank_that_it_could_not_hear() -> None:
    """A rank in another pid namespace is known by its pings, and they wait in the socket meanwhile."""

    async def scenario() -> None:
        time, gone = Time(), []
        clock = RunningClock(time)
        watch = ProcessWatch(asyncio.get_running_loop(), clock.now_s, gone.append, lease_s=30.0)
        ours = process_of(os.getpid())
        watch.add("rank", Process(ours.pid, ours.start_ticks, "another namespace"))
        time.s += 40
        clock.tick()
        watch.check_leases()
        assert gone == []
        for _ in range(100):
            time.s += 0.5
            clock.tick()
            watch.check_leases()
        assert gone == ["rank"]

    asyncio.run(scenario())
