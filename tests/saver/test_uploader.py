"""Uploads in a saver: real slots and storage, the second tier a directory whose commits a test can hold and fail."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from async_ckpt.core.manifest import committed, read_manifest
from async_ckpt.core.protocol import Bye, Granted, Ping, Ready, Refused, Settled, Staged, Started, Uploaded
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import remove_run
from async_ckpt_saver.commands.status import render
from async_ckpt_saver.local_storage import LocalStorage
from async_ckpt_saver.metrics import Metrics
from async_ckpt_saver.status import decode_status, encode_status
from async_ckpt_saver.writer import CommitError, CommitJob, CommitResult
from tests.saver.hub_bench import Bench, register, scenario, stage


class Tiered:
    """One rank, "A". While `hold` an upload waits; `fail` is what it raises. `uploads` counts those begun."""

    def __init__(self, endpoint: str, root: Path, policy: Policy | None = None) -> None:
        self.first, self.second = root / "first", root / "second"
        self.saver = Bench(endpoint, root)
        self.policy = policy or Policy()
        self.passing = threading.Event()
        self.passing.set()
        self.begun = threading.Event()
        self.fail: BaseException | None = None
        self.metrics = Metrics(self.saver.hub.status)
        self.saver.services.on_uploaded = self.metrics.observe_upload
        self._sequence = 0

    def commit_once(self, job: CommitJob, still_whole: Callable[[], bool]) -> CommitResult:
        if job.directory == str(self.second):
            self.begun.set()
            assert self.passing.wait(20)
            if self.fail is not None:
                raise self.fail
        return self._commit_once(LocalStorage(job.directory, self.first.parent), job, still_whole)

    async def start(self, job: str = "job") -> Started:
        message = register(self.first, 0, 1, job=job)
        options = msgspec.structs.replace(message.options, policy=self.policy, upload_to=str(self.second))
        self.saver.say("A", msgspec.structs.replace(message, options=options))
        self.granted = await self.saver.hear("A", Granted)
        self.saver.say("A", Ready())
        return await self.saver.hear("A", Started)

    async def commit(self, step: int) -> None:
        stage(self.granted, 0, 0, step)
        self._sequence += 1
        self.saver.say("A", Staged(seq=self._sequence, slot=0, step=step, copy_s=0.1))
        await self.saver.until(lambda: step in self.steps(Settled), f"{step} settled")

    async def uploaded(self, step: int) -> Uploaded:
        await self.saver.until(lambda: step in self.steps(Uploaded), f"{step} uploaded")
        return [each for each in self.saver.heard("A", Uploaded) if each.step == step][-1]

    def steps(self, kind: type[Settled | Uploaded]) -> list[int]:
        return [each.step for each in self.saver.heard("A", kind)]

    def leave(self) -> None:
        self.saver.say("A", Bye(seq=99))

    def here(self) -> list[int]:
        return [step for step, _ in committed(self.first)]

    def there(self) -> list[int]:
        return [step for step, _ in committed(self.second)]

    def __enter__(self) -> Tiered:
        self._commit_once = LocalStorage.commit_once
        tiered = self
        LocalStorage.commit_once = lambda storage, job, whole: tiered.commit_once(job, whole)  # type: ignore
        return self

    def __exit__(self, *_: object) -> None:
        self.passing.set()
        LocalStorage.commit_once = self._commit_once  # type: ignore[method-assign]


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@scenario
async def test_the_second_tier_gets_the_same_bytes_and_its_own_link(endpoint: str, root: Path) -> None:
    with Tiered(endpoint, root) as tiered:
        started = await tiered.start()
        assert started.resume is None
        await tiered.commit(1)
        assert await tiered.uploaded(1) == Uploaded(step=1, outcome="uploaded", url=str(tiered.second / "checkpoint-1"))
        found = files_of(tiered.second / "checkpoint-1")
        assert found == files_of(tiered.first / "checkpoint-1")
        assert found.keys() == {"adapter_model.safetensors", "README.md", "async_ckpt.json"}
        assert os.readlink(tiered.second / "latest") == "checkpoint-1"
        tiered.leave()
        await tiered.saver.until(tiered.saver.gone, "everything gone")


@scenario
async def test_a_saver_is_needed_as_long_as_it_uploads(endpoint: str, root: Path) -> None:
    with Tiered(endpoint, root) as tiered:
        await tiered.start()
        tiered.passing.clear()
        await tiered.commit(1)
        tiered.leave()
        await tiered.saver.until(lambda: not tiered.saver.hub.serving, "the run is over")
        tiered.saver.hub.tick()
        assert tiered.saver.hub.uploading
        assert not tiered.saver.hub.quiet
        assert tiered.there() == []
        tiered.passing.set()
        await tiered.saver.until(tiered.saver.gone, "everything gone")
        assert tiered.there() == [1]


@scenario
async def test_a_rank_that_asks_is_told_again(endpoint: str, root: Path) -> None:
    with Tiered(endpoint, root) as tiered:
        await tiered.start()
        await tiered.commit(1)
        first = await tiered.uploaded(1)
        await tiered.saver.until(lambda: not tiered.saver.hub.uploading, "both tiers were compared")
        tiered.saver.say("A", Ping(unsettled=[], not_uploaded=[1, 7]))
        removed = Uploaded(step=7, outcome="dropped", reason="it is in neither tier any more")
        assert tiered.saver.heard("A", Uploaded) == [first, first, removed]
        tiered.leave()
        await tiered.saver.until(tiered.saver.gone, "everything gone")


@scenario
async def test_what_is_held_from_retention_goes_when_it_was_copied(endpoint: str, root: Path) -> None:
    with Tiered(endpoint, root, Policy(keep_last=1)) as tiered:
        await tiered.start()
        tiered.passing.clear()
        await tiered.commit(1)
        await tiered.saver.until(tiered.begun.is_set, "its upload")
        await tiered.commit(2)
        await tiered.commit(3)
        assert (await tiered.uploaded(2)).outcome == "dropped"
        await tiered.saver.until(lambda: tiered.here() == [1, 3], "2 gone, 1 held")
        tiered.passing.set()
        assert (await tiered.uploaded(1)).outcome == "uploaded"
        assert (await tiered.uploaded(3)).outcome == "uploaded"
        await tiered.saver.until(lambda: (tiered.here(), tiered.there()) == ([3], [3]), "retention in both")
        tiered.leave()
        await tiered.saver.until(tiered.saver.gone, "everything gone")


@scenario
async def test_what_waits_for_a_thread_is_held_as_well(endpoint: str, root: Path) -> None:
    """Nothing reads it yet: all threads are busy with other directories."""
    with Tiered(endpoint, root, Policy(keep_last=1)) as tiered:
        await tiered.start()
        await tiered.saver.until(lambda: not tiered.saver.hub.uploading, "both tiers were compared")
        free, run = asyncio.Event(), tiered.saver.services.in_upload_thread

        async def later(work: Callable[[], Any]) -> Any:
            await free.wait()
            return await run(work)

        tiered.saver.services.in_upload_thread = later  # type: ignore[method-assign]
        for step in (1, 2, 3):
            await tiered.commit(step)
        await tiered.saver.until(lambda: tiered.here() == [1, 3], "2 gone, 1 held")
        assert not tiered.begun.is_set()
        free.set()
        for step in (1, 3):
            assert (await tiered.uploaded(step)).outcome == "uploaded"
        await tiered.saver.until(lambda: (tiered.here(), tiered.there()) == ([3], [3]), "retention in both")
        tiered.leave()
        await tiered.saver.until(tiered.saver.gone, "everything gone")


@scenario
async def test_a_failure_is_counted_by_its_cause_told_and_tried_again(endpoint: str, root: Path) -> None:
    with Tiered(endpoint, root, Policy(keep_every=1)) as tiered:
        await tiered.start()
        tiered.fail = CommitError("no room", errno.ENOSPC)
        await tiered.commit(1)
        assert await tiered.uploaded(1) == Uploaded(step=1, outcome="failed", reason="no room")
        status = tiered.saver.hub.status()
        (tier,) = decode_status(encode_status(status)).uploads
        assert (tier.directory, tier.url) == (str(tiered.first), str(tiered.second))
        assert (tier.failures, tier.last_error, tier.uploaded) == ({"enospc": 1}, "step 1: no room", 0)
        assert (tier.last_upload_step, tier.last_upload_age_s) == (None, None)
        assert tier.behind_s > 0
        tiered.fail = None
        await tiered.commit(2)
        assert (await tiered.uploaded(2)).outcome == "uploaded"
        await tiered.saver.until(lambda: tiered.there() == [1, 2], "what had failed")
        await tiered.saver.until(lambda: not tiered.saver.hub.uploading, "all of it")
        (tier,) = tiered.saver.hub.status().uploads
        assert (tier.uploaded, tier.queued, tier.uploading, tier.last_upload_step) == (2, [], None, 1)
        assert tier.behind_s == 0
        expected = sum(read_manifest(tiered.first / f"checkpoint-{step}").total_bytes for step in (1, 2))
        assert tier.uploaded_bytes == expected > 0
        assert [(each.step, each.outcome) for each in tier.uploads] == [(2, "uploaded"), (1, "uploaded")]
        shown = render(tiered.saver.hub.status())
        assert f"{tiered.first} -> {tiered.second}\n  2 uploaded, " in shown
        assert "failed: 1 enospc" in shown
        said = tiered.metrics.exposition().decode()
        for line in (
            'async_ckpt_uploads_total{outcome="uploaded"} 2.0',
            'async_ckpt_uploads_total{outcome="failed"} 1.0',
            'async_ckpt_upload_failures_total{cause="enospc"} 1.0',
            f"async_ckpt_uploaded_bytes_total {float(tier.uploaded_bytes)}",
            "async_ckpt_upload_seconds_count 2.0",
            f'async_ckpt_upload_queued_steps{{directory="{tiered.first}"}} 0.0',
            f'async_ckpt_upload_behind_seconds{{directory="{tiered.first}"}} 0.0',
            f'async_ckpt_last_upload_step{{directory="{tiered.first}"}} 1.0',
        ):
            assert line in said.splitlines(), line
        tiered.leave()
        await tiered.saver.until(tiered.saver.gone, "everything gone")


@scenario
async def test_a_checkpoint_that_somebody_removes_is_not_waited_for(endpoint: str, root: Path) -> None:
    with Tiered(endpoint, root) as tiered:
        await tiered.start()
        tiered.passing.clear()
        await tiered.commit(1)
        await tiered.saver.until(tiered.begun.is_set, "its upload")
        await tiered.commit(2)
        shutil.rmtree(tiered.first / "checkpoint-2")
        tiered.passing.set()
        dropped = await tiered.uploaded(2)
        assert (dropped.outcome, dropped.reason) == (
            "dropped", f"{tiered.first}/checkpoint-2 was removed before it was uploaded")  # fmt: skip
        tiered.leave()
        await tiered.saver.until(tiered.saver.gone, "everything gone")


@scenario
async def test_what_an_earlier_job_left_is_copied_newest_first_as_far_as_rules_keep_it(
    endpoint: str, root: Path
) -> None:
    with Tiered(endpoint, root) as tiered:
        await tiered.start()
        for step in (1, 2, 3):
            await tiered.commit(step)
            await tiered.uploaded(step)
        tiered.leave()
        await tiered.saver.until(tiered.saver.gone, "everything gone")
        for step in (1, 2, 3):
            shutil.rmtree(tiered.second / f"checkpoint-{step}")
        tiered.saver.said.clear()
        tiered.policy = Policy(keep_last=2)
        await tiered.start("next")
        await tiered.uploaded(2)
        assert tiered.steps(Uploaded) == [3, 2]
        await tiered.saver.until(lambda: tiered.there() == [2, 3], "both")
        tiered.leave()
        await tiered.saver.until(tiered.saver.gone, "everything gone")


@scenario
async def test_a_saver_that_ends_waits_for_commits_and_not_for_uploads(endpoint: str, root: Path) -> None:
    with Tiered(endpoint, root) as tiered:
        await tiered.start()
        tiered.passing.clear()
        await tiered.commit(1)
        await tiered.saver.until(tiered.begun.is_set, "its upload")
        stage(tiered.granted, 0, 1, 2)
        tiered.saver.say("A", Staged(seq=50, slot=1, step=2, copy_s=0.1))
        await asyncio.wait_for(tiered.saver.hub.drain(), 10)
        assert tiered.here() == [1, 2]
        assert tiered.there() == []
        remove_run(Path(tiered.granted.run))  # the next saver would go on with it


@scenario
async def test_a_second_tier_outside_the_root_is_refused(endpoint: str, root: Path) -> None:
    saver = Bench(endpoint, root / "inside")
    message = register(root / "inside/run", 0, 1)
    options = msgspec.structs.replace(message.options, upload_to="s3://bucket/run")
    saver.say("A", msgspec.structs.replace(message, options=options))
    (refused,) = saver.heard("A", Refused)
    assert refused.reason.startswith("s3://bucket/run is outside the root")
