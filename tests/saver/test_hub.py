"""One run of one saver, from its ranks' registration to their goodbye or death; only the socket is left out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from async_ckpt.core import manifest, slots
from async_ckpt.core.protocol import (
    Ack,
    Bye,
    Granted,
    LayoutSent,
    Ping,
    Pong,
    Ready,
    Refuse,
    Refused,
    Settled,
    Skipped,
    Staged,
    Started,
)
from async_ckpt.core.slots import Phase, SlotPaths, StateFile, read_journals
from async_ckpt_saver import hub, local_storage
from tests.saver.hub_bench import LAYOUT, ME, Bench, Sleeper, register, scenario, stage


@scenario
async def test_a_run_from_registration_to_goodbye(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "AB")
    assert saver.heard("A", Started) == [Started(resume=None, newest_step=None)]
    for rank in (0, 1):
        stage(granted, rank, 0, 10)
    saver.say("A", Staged(seq=1, slot=0, step=10, copy_s=0.1))
    assert saver.heard("A", Ack) == saver.heard("A", Settled) == [], "its outcome will be the answer"
    saver.say("A", Staged(seq=1, slot=0, step=10, copy_s=0.1))
    assert saver.heard("A", Ack) == [Ack(seq=1)], "said again, because the outcome takes time"
    saver.say("B", Staged(seq=1, slot=0, step=10, copy_s=0.1))
    for name in "AB":
        settled = await saver.hear(name, Settled)
        assert (settled.step, settled.outcome) == (10, "committed")
        assert settled.path == str(root / "run" / "checkpoint-10")
    assert saver.heard("B", Ack) == []
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
async def test_a_slot_that_is_taken_while_it_is_read_is_not_published(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root)
    granted = await saver.start(root / "run", "A")
    original = local_storage.commit_once

    def overtaken(job: Any, *rest: Any) -> Any:
        state = StateFile(SlotPaths(Path(granted.run), 0).state)
        state.mark(0, Phase.WRITING, 3)
        state.close()
        return original(job, *rest)

    local_storage.commit_once = overtaken
    try:
        stage(granted, 0, 0, 1)
        saver.say("A", Staged(seq=1, slot=0, step=1, copy_s=0.1))
        failed = await saver.hear("A", Settled)
    finally:
        local_storage.commit_once = original
    assert "was taken by another step" in failed.reason
    assert [path.name for path in (root / "run").iterdir()] == []
    saver.say("A", Bye(seq=2))
    await saver.until(saver.gone, "everything gone")


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
