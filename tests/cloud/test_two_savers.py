"""Two saver processes that do not know of each other commit one step into one prefix."""

from __future__ import annotations

from pathlib import Path

import pytest

from async_ckpt.core.location import Url
from async_ckpt.core.manifest import MANIFEST_NAME, committed, read_manifest
from async_ckpt.core.objects import Objects
from async_ckpt.core.protocol import Ack, Bye, Settled, Staged
from async_ckpt_saver.object_collection import unfinished_uploads
from tests.cloud.one_rank import FILE, fill, start
from tests.cloud.weed import Weed
from tests.saver.saver_process import Peer, SaverProcess


@pytest.mark.parametrize("delayed", [False, True])
def test_one_of_two_savers_has_the_step(weed: Weed, url: Url, objects: Objects, folder: Path, delayed: bool) -> None:
    """At once, and one after the other has committed: the file and the manifest are the winner's, and stay so."""
    folder.chmod(0o700)
    settled: dict[str, Settled] = {}
    data: dict[str, bytes] = {}
    with (
        SaverProcess(f"ipc://{folder}/a", url.parent, folder / "a.log", env=weed.environment()),
        SaverProcess(f"ipc://{folder}/b", url.parent, folder / "b.log", env=weed.environment()),
        Peer(f"ipc://{folder}/a") as a,
        Peer(f"ipc://{folder}/b") as b,
    ):
        peers = {"a": a, "b": b}
        granted = {name: start(peer, url) for name, peer in peers.items()}
        for name, peer in peers.items():
            data[name] = fill(granted[name], 3)
            peer.say(Staged(seq=1, slot=0, step=3, copy_s=0.1))
            if delayed:
                settled[name] = peer.hear(Settled)
        for name, peer in peers.items():
            if not delayed:
                settled[name] = peer.hear(Settled)
            peer.say(Bye(seq=2))
            peer.hear(Ack)
    outcomes = {name: each.outcome for name, each in settled.items()}
    assert sorted(outcomes.values()) == ["committed", "failed"]
    (winner,) = [name for name, outcome in outcomes.items() if outcome == "committed"]
    (loser,) = [name for name in outcomes if name != winner]
    assert f"{url}/checkpoint-3 exists already" in settled[loser].reason
    assert data["a"] != data["b"]
    assert objects.read((url / "checkpoint-3" / FILE.path).key) == data[winner]
    assert [step for step, _ in committed(url)] == [3]
    assert read_manifest(url / "checkpoint-3").run == Path(granted[winner].run).name
    names = {FILE.path, "README.md", MANIFEST_NAME}
    assert objects.walk(url.key).keys() == {f"checkpoint-3/{name}" for name in names}
    assert unfinished_uploads(objects, url) == []
