"""The network before the store is cut, or the store is busy: tried again, told of, never for longer than allowed."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from async_ckpt.core.attempts import Attempts
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Url
from async_ckpt.core.manifest import committed, latest
from async_ckpt.core.object_errors import ObjectError
from async_ckpt.core.objects import Objects
from async_ckpt_saver import object_storage
from async_ckpt_saver.object_collection import unfinished_uploads
from async_ckpt_saver.writer import CommitError
from tests.cloud.proxy import Mode, Proxy
from tests.cloud.test_object_storage import put
from tests.saver.committing import ADAPTER, make_image


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image") / "image", adapter_bytes=24 << 20)


def assert_there(url: Url, image: Path) -> None:
    assert [step for step, _ in committed(str(url))] == [1]
    assert Objects(url).read((url / "checkpoint-1" / ADAPTER).key) == (image / ADAPTER).read_bytes()
    assert {path.partition("/")[0] for path in Objects(url).walk(url.key)} == {"checkpoint-1"}
    assert unfinished_uploads(Objects(url), url) == []


@pytest.mark.parametrize("mode", ["busy", "cut"])
def test_a_commit_waits_until_the_store_answers_again(
    proxied: tuple[Url, Proxy], image: Path, mode: Mode, caplog: pytest.LogCaptureFixture
) -> None:
    url, proxy = proxied
    proxy.say(mode)
    outcome: list[str] = []
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=lambda: outcome.append(put(url, 1, image)))
        thread.start()
        while not caplog.records:  # our own attempt, after those of the client
            assert thread.is_alive()
            thread.join(0.01)
        proxy.say("pass")
        thread.join(60)
    assert outcome == [f"{url}/checkpoint-1"]
    assert proxy.answers + proxy.cuts >= 1
    said = caplog.records[0].getMessage()
    assert ("asks for fewer requests" if mode == "busy" else "cannot be reached") in said
    assert "attempt 1" in said
    assert_there(url, image)


def test_a_connection_cut_in_mid_upload_is_made_again(proxied: tuple[Url, Proxy], image: Path) -> None:
    url, proxy = proxied
    proxy.cut_after(12 << 20)
    assert put(url, 1, image) == f"{url}/checkpoint-1"
    assert proxy.cuts == 1
    assert proxy.sent_bytes > 24 << 20
    assert_there(url, image)


@pytest.mark.parametrize("mode", ["busy", "cut"])
def test_what_does_not_come_back_fails_the_save_and_leaves_nothing(
    proxied: tuple[Url, Proxy], image: Path, mode: Mode
) -> None:
    url, proxy = proxied
    proxy.say(mode)
    with pytest.raises(CommitError, match=r"step 1 was not committed to s3://.*\d+ attempts within 1 s"):
        put(url, 1, image, timeout_s=1.0)
    proxy.say("pass")
    assert Objects(url).walk(url.key) == {}
    assert latest(str(url)) is None


def test_a_network_that_swallows_everything_ends_the_commit(
    proxied: tuple[Url, Proxy], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection is refused or cut: only time tells. The next commit of the step is not hindered by the first."""
    url, proxy = proxied
    monkeypatch.setattr(object_storage, "_TIDY_S", 1.0)
    proxy.stop_after(12 << 20)
    with pytest.raises(CommitError, match="was not committed"):
        put(url, 1, image, timeout_s=1.0)
    assert proxy.stopped.is_set()
    proxy.say("pass")
    assert latest(str(url)) is None
    assert put(url, 1, image) == f"{url}/checkpoint-1"
    assert_there(url, image)


def test_nothing_is_said_to_be_there_or_not_while_the_store_is_silent(
    proxied: tuple[Url, Proxy], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`latest` must not answer None, nor an older one, for training would then begin anew, or go back."""
    url, proxy = proxied
    put(url, 1, image)

    def fails(objects: Objects, key: str, limit_bytes: int | None = None) -> None:
        raise ObjectError(f"reading {key}: the store cannot be reached")

    with monkeypatch.context() as patch:  # from the second request on: what is there is known, not what is in it
        patch.setattr(Objects, "fetch", fails)
        for look in (latest, committed):
            with pytest.raises(CheckpointError, match="cannot be reached"):
                look(str(url))
    assert str(latest(str(url))) == f"{url}/checkpoint-1"
    proxy.say("cut")
    objects = Objects(url, Attempts(1.0))
    with pytest.raises(CheckpointError, match="cannot be reached"):
        objects.names(url.key)
    with pytest.raises(CheckpointError, match="cannot be reached"):
        Objects(url, Attempts(1.0)).stat((url / "checkpoint-1").key)
