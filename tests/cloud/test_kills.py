"""SIGKILL of the saver in mid-upload, and of the whole store: nothing half can be seen, nothing stays for ever."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_ckpt.core.location import Url
from async_ckpt.core.manifest import committed, latest
from async_ckpt.core.objects import Objects, store_of
from async_ckpt.core.protocol import Ack, Bye, Settled, Staged
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import read_journals, remove_run
from async_ckpt_saver.object_collection import collect_objects, unfinished_uploads
from async_ckpt_saver.object_storage import ObjectStorage
from tests.cloud.one_rank import FILE, fill, start
from tests.cloud.proxy import Proxy
from tests.cloud.test_object_storage import put
from tests.cloud.weed import Weed
from tests.saver.committing import make_image
from tests.saver.saver_process import Peer, SaverProcess


@pytest.fixture(autouse=True)
def _private(folder: Path) -> None:
    folder.chmod(0o700)  # savers listen in it


@pytest.fixture
def endpoint(folder: Path) -> Iterator[str]:
    name = f"ipc://{folder}/s"
    yield name
    left = list(read_journals(name))
    for run, _ in left:
        remove_run(run)
    assert left == []


def test_a_saver_killed_in_mid_upload_loses_nothing(
    proxied: tuple[Url, Proxy], objects: Objects, weed: Weed, endpoint: str, folder: Path
) -> None:
    url, proxy = proxied
    log = folder / "log"
    with Peer(endpoint) as peer:
        first = SaverProcess(endpoint, url.parent, log, env=weed.environment(proxy.endpoint)).up()
        granted = start(peer, url)
        data = fill(granted, 5)
        proxy.stop_after(12 << 20)  # within the second part or the third
        peer.say(Staged(seq=1, slot=0, step=5, copy_s=0.1))
        assert proxy.stopped.wait(30)
        first.kill()
        proxy.say("pass")
        assert latest(str(url)) is None
        assert committed(str(url)) == []
        assert objects.walk(url.key).keys() == {".async-ckpt/checkpoint-5"}
        assert len(unfinished_uploads(objects, url)) == 1
        with SaverProcess(endpoint, url.parent, log, env=weed.environment(proxy.endpoint)):
            settled = peer.hear(Settled)
            assert (settled.step, settled.outcome, settled.path) == (5, "committed", f"{url}/checkpoint-5")
            peer.say(Bye(seq=2))
            peer.hear(Ack)
        assert objects.read((url / "checkpoint-5" / FILE.path).key) == data
        assert {path.partition("/")[0] for path in objects.walk(url.key)} == {"checkpoint-5"}
        assert unfinished_uploads(objects, url) == []


def killed_in_mid_upload(url: Url, proxy: Proxy, weed: Weed, folder: Path) -> None:
    """A saver that never comes back, as if its host were lost: nobody has its slots."""
    endpoint = f"ipc://{folder}/lost"
    with Peer(endpoint) as peer:
        saver = SaverProcess(endpoint, url.parent, folder / "lost.log", env=weed.environment(proxy.endpoint)).up()
        granted = start(peer, url)
        fill(granted, 5)
        proxy.stop_after(12 << 20)
        peer.say(Staged(seq=1, slot=0, step=5, copy_s=0.1))
        assert proxy.stopped.wait(30)
        saver.kill()
        proxy.say("pass")
    remove_run(Path(granted.run))


def test_what_a_living_saver_uploads_is_left_alone(proxied: tuple[Url, Proxy], folder: Path) -> None:
    """`gc` and the sweep of another job, in the middle of it."""
    url, proxy = proxied
    image = make_image(folder / "image", adapter_bytes=24 << 20)
    proxy.stop_after(12 << 20)
    outcome: list[object] = []
    thread = threading.Thread(target=lambda: outcome.append(put(url, 1, image)))
    thread.start()
    assert proxy.stopped.wait(30)
    # What is on its way stands still: gc has to go another way to the store.
    with Proxy(proxy.port) as beside, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", beside.endpoint)
        store_of.cache_clear()
        found = collect_objects(url, Policy(keep_last=1), dry_run=False)
        ObjectStorage(url).sweep()
        assert [(each.name, each.done) for each in found] == [("checkpoint-1", False)]
        assert "a saver is at work on it" in found[0].reason
        assert len(unfinished_uploads(Objects(url), url)) == 1
        assert Objects(url).walk(url.key).keys() == {".async-ckpt/checkpoint-1"}
    store_of.cache_clear()
    proxy.say("pass")
    thread.join(60)
    assert outcome == [f"{url}/checkpoint-1"]


def test_what_a_lost_host_had_uploaded_is_collected(
    proxied: tuple[Url, Proxy], objects: Objects, weed: Weed, folder: Path
) -> None:
    """Here the store cannot be asked whether the saver is dead, but /proc can."""
    url, proxy = proxied
    killed_in_mid_upload(url, proxy, weed, folder)
    assert len(unfinished_uploads(objects, url)) == 1
    rehearsal = collect_objects(url, Policy(), dry_run=True)
    assert [(each.kind, each.done, each.reason.partition(",")[0]) for each in rehearsal] == [
        ("leftover", False, "half a commit"), ("leftover", False, "never completed")]  # fmt: skip
    done = collect_objects(url, Policy(), dry_run=False)
    assert len(done) >= 1
    assert all(each.done for each in done)
    assert objects.walk(url.key) == {}
    assert unfinished_uploads(objects, url) == []


def test_a_new_job_saves_the_step_that_a_lost_host_was_uploading(
    proxied: tuple[Url, Proxy], objects: Objects, weed: Weed, folder: Path
) -> None:
    url, proxy = proxied
    killed_in_mid_upload(url, proxy, weed, folder)
    image = make_image(folder / "image")
    assert put(url, 5, image, run="another") == f"{url}/checkpoint-5"
    assert [each.step for each in ObjectStorage(url).committed_by("another")] == [5]
    assert {path.partition("/")[0] for path in objects.walk(url.key)} == {"checkpoint-5"}
    assert unfinished_uploads(objects, url) == []


def test_the_store_is_killed_and_comes_back(proxied: tuple[Url, Proxy], weed: Weed, folder: Path) -> None:
    """In mid-upload, with a real SIGKILL of the whole server: the commit waits for it and ends well."""
    url, proxy = proxied
    image = make_image(folder / "image", adapter_bytes=24 << 20)
    proxy.stop_after(12 << 20)
    outcome: list[object] = []
    thread = threading.Thread(target=lambda: outcome.append(put(url, 1, image)))
    thread.start()
    assert proxy.stopped.wait(30)
    os.killpg(weed.process.pid, signal.SIGKILL)
    weed.process.wait()
    proxy.say("pass")
    proxy.reached.clear()
    assert proxy.reached.wait(30)  # it tries, and there is nobody
    weed.start()
    thread.join(60)
    assert outcome == [f"{url}/checkpoint-1"]
    data = Objects(url).read((url / "checkpoint-1/adapter_model.safetensors").key)
    assert data == (image / "adapter_model.safetensors").read_bytes()
    assert unfinished_uploads(Objects(url), url) == []
