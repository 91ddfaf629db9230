"""A filesystem that hangs holds up the runs that lie on it, and nobody else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.core.manifest import committed
from async_ckpt.core.protocol import Ack, Bye, Failed, Granted, Ping, Pong, Settled, Staged
from async_ckpt_saver import local_storage
from async_ckpt_saver.hub import Hub
from tests.saver.hub_bench import Bench, Sleeper, register, scenario, stage

_NAMES = ("commit_once", "sweep", "apply_policy")


@contextmanager
def hanging(*directories: Path) -> Iterator[threading.Event]:
    """Every work on storage of these directories waits until the event is set; it is, at the end of the block."""
    release = threading.Event()
    originals = {name: getattr(local_storage, name) for name in _NAMES}
    below_root = local_storage.below_root

    @contextmanager
    def slow(directory: str, root: Path) -> Any:
        if Path(directory) in directories:
            assert threading.current_thread() is not threading.main_thread(), "in the loop of the saver"
            release.wait(60)
        with below_root(directory, root) as place:
            yield place

    local_storage.below_root = slow  # type: ignore[assignment]
    try:
        yield release
    finally:
        release.set()
        local_storage.below_root = below_root
        for name, original in originals.items():
            setattr(local_storage, name, original)


@scenario
async def test_runs_on_a_hung_filesystem_keep_no_other_run_waiting(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    stuck = [root / f"stuck-{number}" for number in range(6)]
    granted = [await saver.start(directory, f"{number}") for number, directory in enumerate(stuck)]
    with hanging(*stuck) as release:
        for number, each in enumerate(granted):
            stage(each, 0, 0, 1)
            saver.say(f"{number}", Staged(seq=1, slot=0, step=1, copy_s=0.1))
        healthy = await saver.start(root / "healthy", "A")
        stage(healthy, 0, 0, 1)
        saver.say("A", Staged(seq=1, slot=0, step=1, copy_s=0.1))
        assert (await saver.hear("A", Settled)).outcome == "committed"
        assert [saver.heard(f"{number}", Settled) for number in range(6)] == [[]] * 6
        release.set()
        for number in range(6):
            assert (await saver.hear(f"{number}", Settled)).outcome == "committed"
    for number in range(6):
        saver.say(f"{number}", Bye(seq=2))
    saver.say("A", Bye(seq=2))
    await saver.until(saver.gone, "everything is gone")
    await saver.hub.drain()


@scenario
async def test_jobs_that_come_to_a_hung_directory_again_and_again_keep_no_other_waiting(
    endpoint: str, root: Path
) -> None:
    """Each attach waits in a thread of its own, and is given up when its rank is gone."""
    saver = Bench(endpoint, root)
    with hanging(root / "stuck"):
        for attempt in range(6):
            child = Sleeper()
            saver.say(f"{attempt}", register(root / "stuck", 0, 1, job=f"job {attempt}", process=child.process))
            await asyncio.sleep(0)
            child.kill()
            await saver.until(lambda: not any(desk.registering for desk in saver.hub._desks.values()), "given up")
        await saver.start(root / "healthy", "A")
        assert saver.heard("0", Granted) == []
    saver.say("A", Bye(seq=1))
    await saver.until(saver.gone, "everything is gone")
    await saver.hub.drain()
    assert saver.services.threads == {}


@scenario
async def test_a_saver_that_finds_a_run_on_a_hung_filesystem_serves_the_others_at_once(
    endpoint: str, root: Path
) -> None:
    first = Bench(endpoint, root)
    granted = await first.start(root / "stuck", "A")
    stage(granted, 0, 0, 1)
    second = Bench(endpoint, root)
    with hanging(root / "stuck") as release:
        second.hub.adopt()
        second.say("A", Ping(unsettled=[1]))
        assert second.heard("A", Pong)[-1].known
        second.say("A", Staged(seq=1, slot=0, step=1, copy_s=0.1))
        second.say("A", Failed(seq=2, slot=1, step=2, reason="no"))
        await second.start(root / "healthy", "B")
        assert second.heard("A", Ack) == second.heard("A", Settled) == [], "what lies there is not known yet"
        release.set()
        await second.hear("A", Settled, 2)
    assert {settled.step: settled.outcome for settled in second.heard("A", Settled)} == {1: "committed", 2: "failed"}
    assert [ack.seq for ack in second.heard("A", Ack)] == [1, 2]
    assert [step for step, _ in committed(root / "stuck")] == [1]
    for name in ("A", "B"):
        second.say(name, Bye(seq=3))
    await second.until(second.gone, "everything is gone")
    await second.hub.drain()


@scenario
async def test_ranks_that_die_while_their_run_is_looked_at_are_dead_afterwards(endpoint: str, root: Path) -> None:
    first, child = Bench(endpoint, root), Sleeper()
    granted = await first.start(root / "stuck", "A", processes=[child.process])
    stage(granted, 0, 0, 1)
    second = Bench(endpoint, root)
    second.services.orphan_image_s = 0.0
    with hanging(root / "stuck") as release:
        second.hub.adopt()
        child.kill()
        await asyncio.sleep(0.2)
        second.hub.tick()
        release.set()
        await second.until(second.gone, "the run has ended")
    assert [step for step, _ in committed(root / "stuck")] == [1]
    await second.hub.drain()


@scenario
async def test_what_was_told_to_have_failed_is_not_committed_for_a_word_that_comes_early(
    endpoint: str, root: Path
) -> None:
    first = Bench(endpoint, root)
    granted = await first.start(root / "stuck", "A")
    first.say("A", Failed(seq=1, slot=0, step=1, reason="no"))
    await first.hear("A", Settled)
    stage(granted, 0, 0, 1)  # as if the journal said so all the same
    second = Bench(endpoint, root)
    with hanging(root / "stuck"):
        second.hub.adopt()
        second.say("A", Staged(seq=2, slot=0, step=1, copy_s=0.1))
    assert (await second.hear("A", Settled)).outcome == "failed"
    assert committed(root / "stuck") == []
    second.say("A", Bye(seq=3))
    await second.until(second.gone, "everything is gone")
    await second.hub.drain()


@pytest.mark.parametrize("count", [1, 5])
def test_adopting_touches_no_storage_in_the_loop(endpoint: str, tmp_path: Path, count: int) -> None:
    """Nor do links in the directory's own name: they would have to be looked up there."""

    async def body() -> None:
        first = Bench(endpoint, tmp_path)
        for number in range(count):
            await first.start(tmp_path / f"run-{number}", f"{number}")
        second = Bench(endpoint, tmp_path)
        resolved: list[Path] = []
        with pytest.MonkeyPatch.context() as patch:
            resolve = Path.resolve
            patch.setattr(Path, "resolve", lambda path, *rest: resolved.append(path) or resolve(path, *rest))
            Hub.adopt(second.hub)
        assert [path for path in resolved if path.is_relative_to(tmp_path)] == []
        for number in range(count):
            second.say(f"{number}", Bye(seq=1))
        await second.until(second.gone, "everything is gone")
        await second.hub.drain()

    asyncio.run(body())
