"""A saver that comes after another: it has nothing but what lies in shared memory and on disk.

Its death is a new Hub on the same endpoint.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from async_ckpt.core import manifest
from async_ckpt.core.protocol import Bye, Granted, Ping, Pong, Ready, Settled, Skipped, Staged, Started
from async_ckpt_saver import local_storage
from async_ckpt_saver.temporaries import held, leftovers
from tests.saver.hub_bench import Bench, Sleeper, register, scenario, stage


@scenario
async def test_a_new_saver_takes_up_the_living_run_and_the_kept_image(endpoint: str, root: Path) -> None:
    """Whatever the random names of the two runs: each of several tries draws them anew."""
    for attempt in range(6):
        directory = root / f"run-{attempt}"
        saver, child = Bench(endpoint, root), Sleeper()
        first = await saver.start(directory, "A", processes=[child.process])
        stage(first, 0, 0, 7)
        child.kill()
        second = await saver.start(directory, "B", job="again")
        stage(second, 0, 0, 8)
        after = Bench(endpoint, root)
        after.hub.adopt()
        await after.until((directory / "checkpoint-8").exists, "the staged step committed")
        after.say("B", Ping(unsettled=[8]))
        assert (await after.hear("B", Pong)).known
        assert (await after.hear("B", Settled)).outcome == "committed"
        after.say("B", Bye(seq=1))
        after.services.orphan_image_s = 0
        await after.until(after.gone, "everything gone")
        assert [step for step, _ in manifest.committed(directory)] == [7, 8]


@scenario
async def test_a_run_that_had_not_started_is_set_up_anew_by_the_next_saver(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    saver.say("A", register(root / "run", 0, 1))
    first = await saver.hear("A", Granted)
    assert first.owned == [0]
    after = Bench(endpoint, root)
    after.hub.adopt()
    after.say("A", Ready())
    assert not (await after.hear("A", Pong)).known, "the client registers again when it hears this"
    second = await after.start(root / "run", "A")
    assert second.owned == [0]
    assert second.run != first.run
    assert not Path(first.run).exists()
    after.say("A", Bye(seq=1))
    await after.until(after.gone, "everything gone")


@scenario
async def test_a_rank_that_missed_the_start_hears_the_same_from_the_next_saver(endpoint: str, root: Path) -> None:
    saver, child = Bench(endpoint, root), Sleeper()
    first = await saver.start(root / "run", "A", processes=[child.process])
    stage(first, 0, 0, 7)
    child.kill()
    await saver.start(root / "run", "BC", job="again")
    after = Bench(endpoint, root)
    after.hub.adopt()
    after.say("C", Ready())
    assert await after.hear("C", Started) == saver.heard("B", Started)[0]
    assert after.heard("C", Started)[0].newest_step == 7
    for name in "BC":
        after.say(name, Bye(seq=1))
    after.services.orphan_image_s = 0
    await after.until(after.gone, "everything gone")


@scenario
async def test_a_committed_step_is_told_as_committed_by_the_next_saver(endpoint: str, root: Path) -> None:
    """Though a rank that heard of it in time has gone on, in the same slot."""
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "AB")
    for rank, name in enumerate("AB"):
        stage(granted, rank, 0, 10)
        saver.say(name, Staged(seq=1, slot=0, step=10, copy_s=0.1))
    await saver.hear("B", Settled)
    stage(granted, 1, 0, 30)
    after = Bench(endpoint, root)
    after.hub.adopt()
    after.say("A", Ping(unsettled=[10]))
    settled = await after.hear("A", Settled)
    assert (settled.step, settled.outcome) == (10, "committed")
    for name in "AB":
        after.say(name, Bye(seq=2))
    await after.until(after.gone, "everything gone")


@scenario
async def test_diverged_replicas_fail_the_step_also_after_a_restart_of_the_saver(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "AB", verify=True)
    for rank in (0, 1):
        stage(granted, rank, 0, 10, replica_hashes={"tensor 'w'": rank})
    after = Bench(endpoint, root)
    after.hub.adopt()
    settled = await after.hear("A", Settled)
    assert settled.outcome == "failed"
    assert "tensor 'w' differs between rank 0 and rank 1" in settled.reason
    assert not (root / "run" / "checkpoint-10").exists()
    for name in "AB":
        after.say(name, Bye(seq=2))
    await after.until(after.gone, "everything gone")


@scenario
async def test_half_a_commit_of_a_killed_saver_is_swept(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "A")
    half = root / "run" / ".checkpoint-10.abc.tmp"
    half.mkdir()
    stage(granted, 0, 0, 10)
    after = Bench(endpoint, root)
    after.hub.adopt()
    await after.until((root / "run" / "checkpoint-10").exists, "the commit")
    assert not half.exists()
    after.say("A", Bye(seq=2))
    await after.until(after.gone, "everything gone")


@scenario
async def test_a_step_that_failed_is_not_taken_up_again_by_the_next_saver(endpoint: str, root: Path) -> None:
    """Its ranks were told, and may be writing another step into the slot."""
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "A")
    (root / "run" / "checkpoint-1").mkdir()
    stage(granted, 0, 0, 1)
    saver.say("A", Staged(seq=1, slot=0, step=1, copy_s=0.1))
    failed = await saver.hear("A", Settled)
    assert failed.outcome == "failed"
    assert "exists already" in failed.reason
    (root / "run" / "checkpoint-1").rmdir()
    after = Bench(endpoint, root)
    after.hub.adopt()
    after.say("A", Ping(unsettled=[1]))
    assert (await after.hear("A", Settled)).outcome == "failed"
    assert not (root / "run" / "checkpoint-1").exists()
    after.say("A", Bye(seq=2))
    await after.until(after.gone, "everything gone")


@scenario
async def test_a_run_outside_the_root_is_left_alone_and_others_are_gone_on_with(endpoint: str, root: Path) -> None:
    (root / "inside").mkdir()
    saver, child = Bench(endpoint, root), Sleeper()
    outside = await saver.start(root / "outside", "A", job="a", processes=[child.process])
    inside = await saver.start(root / "inside" / "run", "B", job="b", processes=[child.process])
    for granted in (outside, inside):
        stage(granted, 0, 0, 1)
    after = Bench(endpoint, root / "inside")
    after.hub.adopt()
    await after.until((root / "inside" / "run" / "checkpoint-1").exists, "the commit inside")
    assert not (root / "outside" / "checkpoint-1").exists()
    assert Path(outside.run).exists()
    child.kill()
    saver.services.orphan_image_s = after.services.orphan_image_s = 0
    await after.until(lambda: after.hub.quiet, "quiet")
    await saver.until(saver.gone, "everything gone")


@scenario
async def test_another_savers_commit_under_way_is_not_swept(endpoint: str, root: Path) -> None:
    temporary = root / ".checkpoint-5.abc.tmp"
    temporary.mkdir()
    with held(str(temporary)):
        assert leftovers(root) == []
    assert [entry.name for entry in leftovers(root)] == [temporary.name]


@scenario
async def test_a_saver_that_starts_on_a_failing_disk_goes_on_with_the_run(endpoint: str, root: Path) -> None:
    """What was staged fails, or lands if the disk is back in time; the run is not given up for it."""
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "A")
    stage(granted, 0, 0, 1)
    saver.say("A", Staged(seq=1, slot=0, step=1, copy_s=0.1))
    assert (await saver.hear("A", Settled)).outcome == "committed"
    original = os.fsync

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    os.fsync = broken
    try:
        stage(granted, 0, 1, 2)
        after = Bench(endpoint, root)
        after.hub.adopt()
        failed = await after.hear("A", Settled, 2)
        assert (failed.step, failed.outcome) == (2, "failed")
        assert "Input/output error" in failed.reason
    finally:
        os.fsync = original
    after.say("A", Ping(unsettled=[]))
    assert (await after.hear("A", Pong)).known
    stage(granted, 0, 0, 3)
    after.say("A", Staged(seq=3, slot=0, step=3, copy_s=0.1))
    assert (await after.hear("A", Settled, 3)).outcome == "committed"
    after.say("A", Bye(seq=4))
    await after.until(after.gone, "everything gone")


@scenario
async def test_a_save_skipped_for_want_of_a_slot_does_not_cost_the_step_in_it(endpoint: str, root: Path) -> None:
    """The disk is slow, the rank skips a step whose slot still holds an earlier one, and the saver is killed."""
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "A")
    started, release = threading.Event(), threading.Event()
    original = local_storage.commit_once

    def stuck(job: Any, *rest: Any) -> Any:
        started.set()
        assert release.wait(30)
        raise OSError("this saver is dead")

    local_storage.commit_once = stuck
    try:
        stage(granted, 0, 0, 1)
        saver.say("A", Staged(seq=1, slot=0, step=1, copy_s=0.1))
        await saver.until(started.is_set, "the commit begun")
        saver.say("A", Skipped(seq=2, slot=0, step=3, reason="slot 0 still holds step 1"))
        assert [settled.step for settled in saver.heard("A", Settled)] == [3]
    finally:
        local_storage.commit_once = original
    after = Bench(endpoint, root)
    after.hub.adopt()
    after.say("A", Ping(unsettled=[1]))
    await after.until((root / "run" / "checkpoint-1").exists, "the commit")
    after.say("A", Bye(seq=3))
    await after.until(after.gone, "everything gone")
    release.set()
    await saver.services.drain()


@scenario
async def test_a_report_that_is_said_again_after_a_later_one_costs_no_step(endpoint: str, root: Path) -> None:
    """The first saver died with B's word on step 1; B is heard on step 2 before it says it again."""
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "AB")
    after = Bench(endpoint, root)
    after.hub.adopt()
    for step in (1, 2):
        for rank in (0, 1):
            stage(granted, rank, step % 2, step)
    after.say("A", Staged(seq=1, slot=1, step=1, copy_s=0.1))
    after.say("B", Staged(seq=2, slot=0, step=2, copy_s=0.1))
    after.say("A", Staged(seq=2, slot=0, step=2, copy_s=0.1))
    after.say("B", Staged(seq=1, slot=1, step=1, copy_s=0.1))
    await after.hear("A", Settled, 2)
    assert [(each.step, each.outcome) for each in after.heard("A", Settled)] == [(1, "committed"), (2, "committed")]
    for name in "AB":
        after.say(name, Bye(seq=3))
    await after.until(after.gone, "everything gone")


@scenario
async def test_a_step_that_an_earlier_saver_settled_is_settled_for_late_ones(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "AB")
    saver.say("A", Skipped(seq=1, slot=1, step=1, reason="busy"))
    after = Bench(endpoint, root)
    after.hub.adopt()
    stage(granted, 1, 1, 1)
    after.say("B", Staged(seq=1, slot=1, step=1, copy_s=0.1))
    assert (await after.hear("B", Settled)).outcome == "failed"
    for name in "AB":
        after.say(name, Bye(seq=3))
    await after.until(after.gone, "everything gone")
