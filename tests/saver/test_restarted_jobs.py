"""Jobs that come after others, or beside them, in one directory."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from async_ckpt.core.protocol import Bye, Granted, Ping, Ready, Refuse, Refused, Settled, Staged, Started
from async_ckpt_saver import desk, local_storage, watch
from tests.saver.hub_bench import FILE, ME, Bench, Sleeper, elsewhere, register, scenario, stage


@scenario
async def test_a_restarted_job_resumes_from_ram_and_the_image_goes_with_its_first_commit(
    endpoint: str, root: Path
) -> None:
    saver, child = Bench(endpoint, root), Sleeper()
    first = await saver.start(root / "run", "A", processes=[child.process])
    stage(first, 0, 1, 10)
    child.kill()
    await saver.start(root / "run", "B", job="again")
    (started,) = saver.heard("B", Started)
    assert started.newest_step == 10
    assert started.resume is not None
    assert started.resume.image == f"{first.run}/slot-1"
    assert Path(started.resume.image, FILE.path).read_bytes().startswith(FILE.header)
    (second,) = saver.heard("B", Granted)
    stage(second, 0, 0, 20)
    saver.say("B", Staged(seq=1, slot=0, step=20, copy_s=0.1))
    await saver.hear("B", Settled)
    assert not Path(first.run).exists()
    saver.say("B", Bye(seq=2))
    await saver.until(saver.gone, "everything gone")


@scenario
async def test_a_job_waits_for_the_lease_of_a_dead_one_that_cannot_be_seen(endpoint: str, root: Path) -> None:
    """Ranks in another pid namespace, as in a container beside the saver's. Their pids are all alive here, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk, "_CONFLICT_S", 0.2)
        patch.setattr(watch, "_FRESH_S", 0.1)
        saver = Bench(endpoint, root, lease_s=1.0)
        first = await saver.start(root / "run", "A", processes=[elsewhere(ME)])
        stage(first, 0, 0, 10)  # and dies, so it never says so
        await saver.start(root / "run", "B", job="again")
    assert saver.heard("B", Refused) == []
    (started,) = saver.heard("B", Started)
    assert started.newest_step == 10
    assert started.resume is not None
    assert started.resume.image == f"{first.run}/slot-0"
    saver.say("B", Bye(seq=1))
    await saver.until(saver.gone, "everything gone")


@scenario
async def test_a_job_is_refused_while_one_that_cannot_be_seen_speaks(endpoint: str, root: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk, "_CONFLICT_S", 0.2)
        saver = Bench(endpoint, root)
        await saver.start(root / "run", "A", processes=[elsewhere(ME)])
        saver.say("B", register(root / "run", 0, 1, job="again"))
        saver.say("A", Ping(unsettled=[]))
        assert "ranks are alive" in (await saver.hear("B", Refused)).reason
    saver.say("A", Bye(seq=1))
    await saver.until(saver.gone, "everything gone")


@scenario
async def test_a_job_waits_for_the_last_commit_of_the_dead_one_before_it(endpoint: str, root: Path) -> None:
    saver, child = Bench(endpoint, root), Sleeper()
    granted = await saver.start(root / "run", "A", processes=[child.process])
    release = threading.Event()
    original, waits = local_storage.commit_once, desk._CONFLICT_S
    desk._CONFLICT_S = 0.0

    def stuck(job: Any, *rest: Any) -> Any:
        assert release.wait(30)
        return original(job, *rest)

    local_storage.commit_once = stuck
    try:
        stage(granted, 0, 0, 7)
        child.kill()
        (run,) = saver.hub._desks[str(root / "run")]._runs
        await saver.until(lambda: not run.living, "the death noticed")
        saver.say("B", register(root / "run", 0, 1, job="again"))
        for _ in range(20):
            saver.hub.tick()
            await asyncio.sleep(0.01)
        assert saver.heard("B", Refused) == []
        release.set()
        assert await saver.hear("B", Granted)
    finally:
        local_storage.commit_once, desk._CONFLICT_S = original, waits
    saver.say("B", Ready())
    assert (await saver.hear("B", Started)).newest_step == 7
    saver.say("B", Bye(seq=1))
    saver.services.orphan_image_s = 0
    await saver.until(saver.gone, "everything gone")


@scenario
async def test_two_living_jobs_do_not_share_a_directory(endpoint: str, root: Path) -> None:
    saver, child = Bench(endpoint, root), Sleeper()
    await saver.start(root / "run", "A", processes=[child.process])
    waits, desk._CONFLICT_S = desk._CONFLICT_S, 0.0
    try:
        saver.say("B", register(root / "run", 0, 1, job="other"))
        assert f"pids [{child.process.pid}]" in (await saver.hear("B", Refused)).reason
    finally:
        desk._CONFLICT_S = waits
    child.kill()
    await saver.until(saver.gone, "everything gone")


@scenario
async def test_a_new_launch_of_the_same_name_is_not_refused_for_the_one_before(endpoint: str, root: Path) -> None:
    """torchrun's job has the same name each time, and kills ranks before they hear that they were refused."""
    saver = Bench(endpoint, root)
    options = register(root / "run", 0, 2).options
    saver.say("A", Refuse(options=options, job="job", rank=0, process=ME, reason="no adapter"))
    await saver.hear("A", Refused)
    child = Sleeper()
    younger = msgspec.structs.replace(child.process, start_ticks=child.process.start_ticks + 1000)
    saver.say("B", register(root / "run", 1, 2, process=younger))
    assert all("no adapter" not in refused.reason for refused in saver.heard("B", Refused))
    child.kill()


@scenario
async def test_without_pidfds_the_living_live_and_the_dead_are_found(endpoint: str, root: Path) -> None:
    """Old kernels and some sandboxes have none."""

    def missing(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    original, os.pidfd_open = os.pidfd_open, missing
    try:
        saver, child = Bench(endpoint, root), Sleeper()
        granted = await saver.start(root / "run", "A", processes=[child.process])
        stage(granted, 0, 0, 1)
        child.kill()
        await saver.until((root / "run" / "checkpoint-1").exists, "the commit after the death")
    finally:
        os.pidfd_open = original
    saver.services.orphan_image_s = 0
    await saver.until(saver.gone, "everything gone")
