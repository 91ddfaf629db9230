"""All runs of one saver: real slots, real storage, real processes whose deaths are seen; only the socket is left out.

A saver's death is a new Hub on the same endpoint, which has nothing but what lies in shared memory and on disk.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from async_ckpt.core import manifest, slots
from async_ckpt.core.claims import pack_claims
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import (
    PROTOCOL,
    Ack,
    Bye,
    Claim,
    FromSaver,
    Granted,
    ImageFile,
    Layout,
    LayoutSent,
    Options,
    Ping,
    Pong,
    Process,
    Ready,
    Refuse,
    Refused,
    Register,
    SaveRecord,
    Settled,
    Skipped,
    Staged,
    Started,
)
from async_ckpt.core.region import Region
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import Phase, SlotPaths, StateFile, read_journals, remove_run, shm_identity
from async_ckpt_saver import desk, hub, live, watch
from async_ckpt_saver.hub import Hub
from async_ckpt_saver.services import Services
from async_ckpt_saver.temporaries import held, leftovers

FILE = plan_file("adapter_model.safetensors", [TensorSpec("w", "F32", (8,))])
LAYOUT = Layout((ImageFile(FILE.path, FILE.header, FILE.total_bytes),), {"README.md": b"read me"})
ME = process_of(os.getpid())
T = TypeVar("T", bound=msgspec.Struct)


class Sleeper:
    """A process that stands for a rank, and can be killed."""

    def __init__(self) -> None:
        self._child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.process: Process = process_of(self._child.pid)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()


class Bench:
    """One saver and what it said. Every rank's identity is its name."""

    def __init__(self, endpoint: str, root: Path, *, lease_s: float = 30.0) -> None:
        self.endpoint = endpoint
        self.said: list[tuple[bytes, FromSaver]] = []
        self.services = Services(
            endpoint=endpoint,
            root=root,
            incarnation=secrets.token_hex(4),
            send=lambda identity, message: self.said.append((identity, message)),
            loop=asyncio.get_running_loop(),
            lease_s=lease_s,
        )
        self.hub = Hub(self.services)

    def say(self, identity: str, message: Any) -> None:
        self.hub.receive(identity.encode(), message)

    def heard(self, identity: str, kind: type[T]) -> list[T]:
        return [message for who, message in self.said if who == identity.encode() and isinstance(message, kind)]

    async def hear(self, identity: str, kind: type[T], count: int = 1) -> T:
        await self.until(lambda: len(self.heard(identity, kind)) >= count, f"{kind.__name__} for {identity}")
        return self.heard(identity, kind)[count - 1]

    async def until(self, condition: Callable[[], object], what: str) -> None:
        deadline_s = self.services.now_s() + 20
        while not condition():
            assert self.services.now_s() < deadline_s, f"never: {what}; said {self.said}"
            self.hub.tick()
            await asyncio.sleep(0.005)

    async def start(self, directory: Path, names: str, *, job: str = "job", processes: list[Process] | None = None,
                    **options: Any) -> Granted:  # fmt: skip
        world = len(names)
        for rank, name in enumerate(names):
            process = processes[rank] if processes else ME
            self.say(name, register(directory, rank, world, job=job, process=process, **options))
        granted = await self.hear(names[0], Granted)
        for name in names:
            self.say(name, Ready())
        await self.hear(names[-1], Started)
        return granted

    def gone(self) -> bool:
        return self.hub.quiet and not list(read_journals(self.endpoint))


def register(
    directory: Path, rank: int, world: int, *, job: str = "job", process: Process = ME, timeout_s: float = 600.0,
    verify: bool = False,
) -> Register:  # fmt: skip
    share = 8 // world
    return Register(
        protocol=PROTOCOL,
        options=Options(str(directory), world, 2, Policy(), timeout_s, verify),
        job=job,
        rank=rank,
        process=process,
        launcher=None,
        shm=shm_identity(),
        layout_hash="h",
        layout=LAYOUT if rank == 0 else None,
        claims=pack_claims([FILE], [Claim(0, 0, Region(False, (rank * share,), (share,)))])[0],
        versions={"torch": "2"},
    )


def elsewhere(process: Process) -> Process:
    """The same numbers in another pid namespace: they mean nothing here."""
    return msgspec.structs.replace(process, pid_namespace="pid:[1]")


def stage(granted: Granted, rank: int, slot: int, step: int, **record: Any) -> None:
    """What a rank leaves in shared memory, whether or not it can still say so."""
    paths = SlotPaths(Path(granted.run), slot)
    if rank == 0 or record:
        paths.write_record(rank, SaveRecord(step, {"loss": 0.5}, None, {}, **record))
    state = StateFile(paths.state)
    state.mark(rank, Phase.STAGED, step)
    state.close()


@pytest.fixture
def endpoint() -> Iterator[str]:
    name = f"ipc:///nowhere/{secrets.token_hex(6)}"
    yield name
    left = list(read_journals(name))
    for run, _ in left:
        remove_run(run)
    assert left == []


def scenario(body: Callable[[str, Path], Awaitable[None]]) -> Callable[[str, Path], None]:
    def test(endpoint: str, tmp_path: Path) -> None:
        async def limited() -> None:
            await asyncio.wait_for(body(endpoint, tmp_path), 60)

        asyncio.run(limited())

    test.__name__ = body.__name__
    test.__doc__ = body.__doc__
    return test


@scenario
async def test_a_run_from_registration_to_goodbye(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "AB")
    assert saver.heard("A", Started) == [Started(resume=None, newest_step=None)]
    for rank in (0, 1):
        stage(granted, rank, 0, 10)
    saver.say("A", Staged(seq=1, slot=0, step=10, copy_s=0.1))
    assert saver.heard("A", Ack) == [Ack(seq=1)]
    assert saver.heard("A", Settled) == []
    saver.say("B", Staged(seq=1, slot=0, step=10, copy_s=0.1))
    for name in "AB":
        settled = await saver.hear(name, Settled)
        assert (settled.step, settled.outcome) == (10, "committed")
        assert settled.path == str(root / "run" / "checkpoint-10")
    found = manifest.read_manifest(root / "run" / "checkpoint-10")
    assert (found.step, found.world, found.metrics) == (10, 2, {"loss": 0.5})
    assert set(found.files) == {"adapter_model.safetensors", "README.md"}
    for name in "AB":
        saver.say(name, Bye(seq=2))
    await saver.until(saver.gone, "everything gone")


@scenario
async def test_a_dead_rank_is_told_to_the_others(endpoint: str, root: Path) -> None:
    saver, child = Bench(endpoint, root), Sleeper()
    granted = await saver.start(root / "run", "AB", processes=[ME, child.process])
    stage(granted, 0, 0, 10)
    saver.say("A", Staged(seq=1, slot=0, step=10, copy_s=0.1))
    child.kill()
    settled = await saver.hear("A", Settled)
    assert settled.outcome == "failed"
    assert "rank 1 of 2 died" in settled.reason
    saver.say("A", Bye(seq=2))
    await saver.until(lambda: not saver.hub._desks or saver.gone(), "the run's end")
    assert not (root / "run" / "checkpoint-10").exists()
    await saver.until(saver.gone, "nothing kept of a run without a complete step")


@scenario
async def test_what_a_dead_rank_had_staged_counts_though_its_message_was_lost(endpoint: str, root: Path) -> None:
    saver, child = Bench(endpoint, root), Sleeper()
    granted = await saver.start(root / "run", "A", processes=[child.process])
    stage(granted, 0, 0, 10)
    child.kill()
    await saver.until((root / "run" / "checkpoint-10").exists, "the commit")
    saver.services.orphan_image_s = 0
    await saver.until(saver.gone, "the image dropped after its lease")


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
async def test_a_job_waits_for_the_last_commit_of_the_dead_one_before_it(endpoint: str, root: Path) -> None:
    saver, child = Bench(endpoint, root), Sleeper()
    granted = await saver.start(root / "run", "A", processes=[child.process])
    release = threading.Event()
    original, waits = live.commit_once, desk._CONFLICT_S
    desk._CONFLICT_S = 0.0

    def stuck(job: Any, still_whole: Callable[[], bool]) -> Any:
        assert release.wait(30)
        return original(job, still_whole)

    live.commit_once = stuck
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
        live.commit_once, desk._CONFLICT_S = original, waits
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
async def test_a_rank_that_dies_between_grant_and_start_is_told(endpoint: str, root: Path) -> None:
    saver, child = Bench(endpoint, root), Sleeper()
    saver.say("A", register(root / "run", 0, 2))
    saver.say("B", register(root / "run", 1, 2, process=child.process))
    await saver.hear("A", Granted)
    child.kill()
    assert "rank 1 died while attaching" in (await saver.hear("A", Refused)).reason
    await saver.until(lambda: not list(read_journals(endpoint)), "the slots gone")


@scenario
async def test_a_rank_that_cannot_take_part_is_told_to_those_before_and_after_it(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    saver.say("A", register(root / "run", 0, 3))
    options = register(root / "run", 1, 3).options
    saver.say("B", Refuse(options=options, job="job", rank=1, process=ME, reason="no adapter"))
    saver.say("C", register(root / "run", 2, 3))
    for name in "ABC":
        assert "rank 1 cannot take part: no adapter" in (await saver.hear(name, Refused)).reason
    assert not (root / "run").exists()
    await saver.until(lambda: saver.hub.quiet, "nothing remembered once all were told")


@scenario
async def test_shared_memory_that_cannot_be_used_refuses_instead_of_hanging(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    shm, slots.SHM = slots.SHM, Path("/proc/no-such-place")
    try:
        saver.say("A", register(root / "run", 0, 1))
        assert "no-such-place" in (await saver.hear("A", Refused)).reason
    finally:
        slots.SHM = shm
    assert not (root / "run").exists()


@scenario
async def test_nothing_is_written_outside_the_root(endpoint: str, root: Path) -> None:
    inside = root / "root"
    inside.mkdir()
    (inside / "link").symlink_to(root)
    saver = Bench(endpoint, inside)
    for name, directory in (("A", root / "run"), ("B", inside / ".." / "run"), ("C", inside / "link" / "run")):
        saver.say(name, register(directory, 0, 1, job=name))
        assert "outside" in (await saver.hear(name, Refused)).reason
    assert not (root / "run").exists()


@scenario
async def test_words_out_of_turn_change_nothing(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    for message in (Ready(), Staged(seq=1, slot=0, step=1, copy_s=0), Ping(unsettled=[1]), LayoutSent(layout=LAYOUT)):
        saver.say("X", message)
    assert [pong.known for pong in saver.heard("X", Pong)] == [False] * 4
    saver.say("X", Bye(seq=5))
    assert saver.heard("X", Ack) == [Ack(seq=5)]
    saver.say("B", register(root / "run", 1, 2))
    saver.say("B", LayoutSent(layout=LAYOUT))
    granted = await saver.start(root / "run", "AB")
    saver.say("A", Skipped(seq=1, slot=0, step=1, reason="busy"))
    saver.say("A", Skipped(seq=1, slot=0, step=1, reason="busy"))
    assert [settled.outcome for settled in saver.heard("B", Settled)] == ["skipped"]
    assert granted.owned == [0]
    for name in "AB":
        saver.say(name, Bye(seq=2))
    await saver.until(saver.gone, "everything gone")


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
async def test_a_directory_removed_under_us_fails_the_step_and_the_next_one_works(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "A")
    shutil.rmtree(root / "run")
    (root / "run").write_text("in the way")
    stage(granted, 0, 0, 10)
    saver.say("A", Staged(seq=1, slot=0, step=10, copy_s=0.1))
    assert (await saver.hear("A", Settled)).outcome == "failed"
    (root / "run").unlink()
    stage(granted, 0, 1, 20)
    saver.say("A", Staged(seq=2, slot=1, step=20, copy_s=0.1))
    assert (await saver.hear("A", Settled, 2)).outcome == "committed"
    saver.say("A", Bye(seq=3))
    await saver.until(saver.gone, "everything gone")


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
async def test_a_slot_that_is_taken_while_it_is_read_is_not_published(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "A")
    original = live.commit_once

    def overtaken(job: Any, still_whole: Callable[[], bool]) -> Any:
        state = StateFile(SlotPaths(Path(granted.run), 0).state)
        state.mark(0, Phase.WRITING, 3)
        state.close()
        return original(job, still_whole)

    live.commit_once = overtaken
    try:
        stage(granted, 0, 0, 1)
        saver.say("A", Staged(seq=1, slot=0, step=1, copy_s=0.1))
        failed = await saver.hear("A", Settled)
    finally:
        live.commit_once = original
    assert "was taken by another step" in failed.reason
    assert [path.name for path in (root / "run").iterdir()] == []
    saver.say("A", Bye(seq=2))
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
    original = live.commit_once

    def stuck(job: Any, still_whole: Callable[[], bool]) -> Any:
        started.set()
        assert release.wait(30)
        raise OSError("this saver is dead")

    live.commit_once = stuck
    try:
        stage(granted, 0, 0, 1)
        saver.say("A", Staged(seq=1, slot=0, step=1, copy_s=0.1))
        await saver.until(started.is_set, "the commit begun")
        saver.say("A", Skipped(seq=2, slot=0, step=3, reason="slot 0 still holds step 1"))
        assert [settled.step for settled in saver.heard("A", Settled)] == [3]
    finally:
        live.commit_once = original
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


@scenario
async def test_runs_registrations_and_ranks_are_capped(endpoint: str, root: Path) -> None:
    caps = hub.MAX_RUNS, hub.MAX_REGISTRATIONS, hub.MAX_IDENTITIES
    try:
        for caps_now, words in (
            ((2, 9, 9), "serves 2 directories already, at most 2 (MAX_RUNS)"),
            ((9, 2, 9), "2 other jobs are attaching right now, at most 2 (MAX_REGISTRATIONS)"),
            ((9, 9, 2), "has 2 ranks, at most 2 (MAX_IDENTITIES)"),
        ):
            hub.MAX_RUNS, hub.MAX_REGISTRATIONS, hub.MAX_IDENTITIES = caps_now
            saver = Bench(endpoint, root)
            for name in "ABC":
                saver.say(name, register(root / name, 0, 2))
            assert saver.heard("A", Refused) + saver.heard("B", Refused) == []
            assert words in saver.heard("C", Refused)[0].reason
            assert saver.services.rejections.counts["limit"] == 1
    finally:
        hub.MAX_RUNS, hub.MAX_REGISTRATIONS, hub.MAX_IDENTITIES = caps
