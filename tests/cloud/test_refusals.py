"""What a store refuses for good: said once, in words that tell what to do, and nothing is tried again."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Url
from async_ckpt.core.manifest import latest
from async_ckpt.core.objects import Objects, store_of
from async_ckpt.core.protocol import Options, Refused
from async_ckpt.core.retention_policy import Policy
from async_ckpt_saver.object_storage import ObjectStorage
from async_ckpt_saver.verification import verify
from async_ckpt_saver.writer import CommitError
from tests.cloud.proxy import Mode, Proxy
from tests.cloud.test_object_storage import put
from tests.cloud.weed import READER, Weed
from tests.saver.committing import make_image
from tests.saver.saver_process import Peer, SaverProcess, register


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image") / "image", adapter_bytes=5000)


@pytest.mark.parametrize(
    ("variable", "code"),
    [("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"), ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch")],
)
def test_wrong_credentials(
    url: Url, image: Path, clean_environment: pytest.MonkeyPatch, variable: str, code: str
) -> None:
    clean_environment.setenv(variable, "wrong")
    store_of.cache_clear()
    said = rf"the credentials are not accepted: see AWS_ACCESS_KEY_ID.*\(HTTP 403 {code}"
    with pytest.raises(CommitError, match=said) as failed:
        put(url, 1, image)
    assert failed.value.errno == errno.EACCES
    for look in (lambda: latest(str(url)), ObjectStorage(url).prepare, lambda: ObjectStorage(url).committed_by("x")):
        with pytest.raises(CheckpointError, match=said):
            look()
    assert "wrong" not in str(failed.value).replace("wrong_", "")
    assert "a secret of tests" not in str(failed.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "the credentials are not accepted"),
        ({"AWS_ACCESS_KEY_ID": READER}, "these credentials may not do that: they need to list, read, write and delete"),
    ],
)
def test_attach_is_refused_with_the_reason(
    url: Url, weed: Weed, folder: Path, changes: dict[str, str], said: str
) -> None:
    """Before the training has cost anything; and so is a prefix that is not below the saver's root."""
    folder.chmod(0o700)
    endpoint = f"ipc://{folder}/s"
    with (
        SaverProcess(endpoint, url.parent, folder / "log", env=weed.environment(**changes)),
        Peer(endpoint) as peer,
    ):
        peer.say(register(folder, options=options(url)))
        assert said in peer.hear(Refused, 60.0).reason
        peer.say(register(folder, options=options(url.parent.parent / "elsewhere"), job="other"))
        assert f"is outside the root {url.parent}" in peer.hear(Refused).reason


def options(url: Url) -> Options:
    return Options(str(url), 1, 2, Policy(), 60.0)


def test_readers_need_no_more_than_to_read(url: Url, image: Path, clean_environment: pytest.MonkeyPatch) -> None:
    """As ranks that restore, and who looks."""
    put(url, 1, image)
    clean_environment.setenv("AWS_ACCESS_KEY_ID", READER)
    store_of.cache_clear()
    assert str(latest(str(url))) == f"{url}/checkpoint-1"
    report = verify(url / "checkpoint-1")
    assert (report.step, report.files, report.unlisted) == (1, 6, [])
    with pytest.raises(CommitError, match="may not do that"):
        put(url, 2, image)


def test_no_credentials_at_all(url: Url, clean_environment: pytest.MonkeyPatch) -> None:
    """Then a role of the machine is asked for, at an address where there is nobody."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        clean_environment.delenv(name)
    clean_environment.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    store_of.cache_clear()
    with pytest.raises(CheckpointError, match="no credentials were found: set AWS_ACCESS_KEY_ID"):
        latest(str(url))


def test_no_such_bucket(url: Url, image: Path) -> None:
    nowhere = Url("s3://nowhere/run")
    for look in (lambda: latest(nowhere), ObjectStorage(nowhere).prepare, lambda: put(nowhere, 1, image)):
        with pytest.raises(CheckpointError, match=r"there is no such bucket: create it.*NoSuchBucket"):
            look()


def test_plain_http_has_to_be_allowed(url: Url, clean_environment: pytest.MonkeyPatch) -> None:
    clean_environment.delenv("AWS_ALLOW_HTTP")
    store_of.cache_clear()
    with pytest.raises(CheckpointError, match="the endpoint is plain http: use https, or set AWS_ALLOW_HTTP=true"):
        latest(str(url))


@pytest.mark.parametrize(
    ("mode", "said", "code"),
    [
        ("full", "the store is full: free some space there, or keep fewer checkpoints", errno.ENOSPC),
        ("skewed", "this host's clock differs from the store's", errno.EINVAL),
    ],
)
def test_what_other_stores_say(proxied: tuple[Url, Proxy], image: Path, mode: Mode, said: str, code: int) -> None:
    url, proxy = proxied
    proxy.say(mode)
    with pytest.raises(CommitError, match=said) as failed:
        put(url, 1, image)
    assert failed.value.errno == code
    assert 1 <= proxy.answers < 12  # the client repeats what a server of status 5xx says, we do not
    proxy.say("pass")
    assert Objects(url).walk(url.key) == {}


@pytest.mark.full
def test_a_store_without_a_free_volume_fails_the_save_and_leaves_nothing(
    clean_environment: pytest.MonkeyPatch, folder: Path, image: Path
) -> None:
    """SeaweedFS calls that an internal error, which may pass: so it is tried until the time is over."""
    with Weed(folder / "weed", volumes=1, volume_mb=1) as full:  # its one volume belongs to the probe of its start
        full.make_bucket("full")
        for name, value in full.environment().items():
            clean_environment.setenv(name, value)
        url = Url("s3://full/run")
        with pytest.raises(CommitError, match=r"the store has failed .*attempts within 3 s"):
            put(url, 1, image, timeout_s=3.0)
        assert latest(url) is None
        assert Objects(url).walk(url.key) == {}
