"""Threads: what waits for a network has its own."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from async_ckpt.core.location import location_of
from async_ckpt_saver.roots import Roots
from async_ckpt_saver.services import Services


def test_a_store_that_does_not_answer_keeps_no_directory_waiting(tmp_path: Path) -> None:
    async def scenario() -> None:
        services = Services(
            endpoint="e",
            root=Roots([tmp_path, location_of("s3://bucket")]),
            incarnation="i",
            send=lambda identity, message: None,
            loop=asyncio.get_running_loop(),
        )
        store, release = services.storage("s3://bucket/run"), threading.Event()
        assert store.far
        stuck = [asyncio.ensure_future(services.in_thread(release.wait, store)) for _ in range(40)]
        await asyncio.sleep(0)
        near = services.in_thread(lambda: threading.current_thread().name, services.storage(str(tmp_path)))
        assert (await asyncio.wait_for(near, 30)).startswith("storage")
        assert not any(each.done() for each in stuck)
        release.set()
        assert await asyncio.gather(*stuck) == [True] * 40
        await services.drain()

    asyncio.run(scenario())
