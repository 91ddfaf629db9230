"""How the ranks of several hosts find the lead: real stores of torch, savers that are only a sentence long."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch.distributed import FileStore, HashStore, PrefixStore, TCPStore

from async_ckpt import hosts
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.keys import generate, read_public, read_secret
from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import Lead, LeadOpen, LeadWanted
from async_ckpt.hosts import Hosts, Link, Notice, read_link
from async_ckpt.links import Board
from async_ckpt.topology import Topology

SERVER = b"S" * 40
NOTHING = Link(None, False, None, None)


class Saver:
    """Opens the port that it is asked for, or the one it has."""

    def __init__(self, port: int = 40_001, key: bytes = SERVER, refusal: str = "") -> None:
        self.port, self.key, self.refusal = port, key, refusal
        self.asked: list[LeadWanted] = []

    def ask(self, message: LeadWanted, answer: type[LeadOpen], timeout_s: float) -> LeadOpen:
        self.asked.append(message)
        if self.refusal:
            raise CheckpointError(self.refusal)
        host, _, port = message.address.rpartition(":")
        return answer(endpoint=f"tcp://{host}:{int(port) or self.port}", server_key=b"" if message.plain else self.key)


@pytest.fixture(params=["hash", "file", "tcp"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "tcp":
        return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return HashStore() if request.param == "hash" else FileStore(str(tmp_path / "store"), 4)


@pytest.fixture
def seen_from(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From now on this process is on the host of that name."""
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.setattr(hosts, "address_of_host", lambda environment: "10.0.0.1")
    return lambda host: monkeypatch.setattr(hosts, "shm_identity", lambda: host)


def one(rank: int, store: Any, link: Link = NOTHING, *, world: int = 4, attempt: int = 1) -> Hosts:
    here = Topology(rank, world, "job", process_of(os.getpid()), None, True)
    return Hosts(here, attempt, None if store is None else Board(store, f"x/{attempt}"), link)


def test_ranks_of_the_leads_host_have_none_and_the_others_get_keys_of_this_attach(
    store: Any, seen_from: Callable[[str], None]
) -> None:
    saver, nobody = Saver(), Saver(refusal="only rank 0 asks")
    seen_from("a")
    first = one(0, store)
    job, lead = first.meet(saver, 5.0)
    assert lead is None
    assert [(asked.address, asked.plain) for asked in saver.asked] == [("10.0.0.1:0", False)]
    assert one(1, store).meet(nobody, 5.0) == (job, None)
    seen_from("b")
    far = [one(rank, store).meet(nobody, 5.0) for rank in (2, 3)]
    assert {name for name, _ in far} == {job}
    for _, there in far:
        assert there is not None
        assert (there.endpoint, there.server_key) == ("tcp://10.0.0.1:40001", SERVER)
        assert (there.public_key, len(there.secret_key)) == (saver.asked[0].allow, 40)
        assert there.secret_key.decode() not in repr(there)
    other_job, _ = one(0, store, attempt=2).meet(saver, 5.0)
    assert other_job != job
    assert saver.asked[1].allow != saver.asked[0].allow, "keys are for one attach"


def test_a_restart_that_the_environment_does_not_tell_has_another_name(seen_from: Callable[[str], None]) -> None:
    """torchrun's agents count restarts each for itself."""
    seen_from("a")
    names = {one(0, HashStore()).meet(Saver(), 5.0)[0] for _ in range(2)}
    assert len(names) == 2


def test_the_secret_leaves_the_store_once_every_rank_is_attached(store: Any, seen_from: Callable[[str], None]) -> None:
    seen_from("a")
    first = one(0, store)
    first.meet(Saver(), 5.0)
    inner = PrefixStore("x/1", store)
    assert inner.check(["lead"])
    first.attached()
    assert not inner.check(["lead"])


def test_rank_0_that_cannot_attach_is_every_ranks_reason(store: Any, seen_from: Callable[[str], None]) -> None:
    seen_from("a")
    first = one(0, store)
    with pytest.raises(CheckpointError, match="no such address"):
        first.meet(Saver(refusal="no such address"), 5.0)
    first.fail("no such address: caf\xe9 \udcff")
    with pytest.raises(CheckpointError, match=r"rank 0 cannot attach: no such address: café \\udcff"):
        one(2, store).meet(Saver(), 5.0)


def test_what_fails_after_the_notice_is_told_by_the_saver_and_not_here(
    store: Any, seen_from: Callable[[str], None]
) -> None:
    seen_from("a")
    first = one(0, store)
    first.meet(Saver(), 5.0)
    first.fail("a shard is missing")
    one(2, store).fail("another rank has nothing to say here")
    assert one(1, store).meet(Saver(), 5.0)[1] is None


def test_silence_of_rank_0_is_an_error_that_says_what_is_missing(store: Any) -> None:
    with pytest.raises(CheckpointError, match=r"rank 0 has not said within 0\.05 s where its saver is"):
        one(3, store).meet(Saver(), 0.05)


def test_what_another_version_wrote_is_an_error(store: Any) -> None:
    Board(store, "x/1").put("lead", b'{"endpoint": 3}')
    with pytest.raises(CheckpointError, match="install the same async-ckpt version"):
        one(3, store).meet(Saver(), 5.0)


def test_a_replaced_saver_is_asked_for_the_same_port_and_key_or_all_attach_again(
    store: Any, seen_from: Callable[[str], None]
) -> None:
    seen_from("a")
    first, saver = one(0, store), Saver()
    name = first.meet(saver, 5.0)
    seen_from("b")
    far = one(2, store)
    before = far.meet(Saver(), 5.0)
    assert first.meet(saver, 5.0) == name
    assert saver.asked[1] == saver.asked[0]
    assert far.meet(Saver(), 5.0) == before
    with pytest.raises(CheckpointError, match="attach again"):
        first.meet(Saver(key=b"T" * 40), 5.0)


def test_a_plain_link_has_no_keys_at_all(store: Any, seen_from: Callable[[str], None]) -> None:
    saver, plain = Saver(), read_link({"ASYNC_CKPT_LINK": "plain", "ASYNC_CKPT_CURVE_SECRET": "/nowhere"})
    seen_from("a")
    one(0, store, plain).meet(saver, 5.0)
    assert (saver.asked[0].plain, saver.asked[0].allow) == (True, b"")
    seen_from("b")
    assert one(2, store, plain).meet(saver, 5.0)[1] == Lead("tcp://10.0.0.1:40001", b"", b"", b"")


def test_keys_of_files_are_not_handed_out_and_a_host_without_one_is_told(
    store: Any, seen_from: Callable[[str], None], tmp_path: Path
) -> None:
    public, secret = generate(tmp_path / "job")
    link = read_link({"ASYNC_CKPT_CURVE_SECRET": str(secret), "ASYNC_CKPT_CURVE_SERVER": str(public)})
    saver = Saver()
    seen_from("a")
    one(0, store, link).meet(saver, 5.0)
    assert saver.asked[0].allow == read_public(public)
    written = Board(store, "x/1").look("lead")
    assert written is not None
    assert read_secret(secret).secret not in written
    assert msgspec.json.decode(written, type=Notice).secret_key == b""
    seen_from("b")
    lead = one(2, store, link).meet(saver, 5.0)[1]
    assert lead == Lead("tcp://10.0.0.1:40001", SERVER, read_public(public), read_secret(secret).secret)
    with pytest.raises(CheckpointError, match="set ASYNC_CKPT_CURVE_SECRET on every host, or on none"):
        one(3, store).meet(saver, 5.0)


def test_the_variable_names_the_interface_and_what_leads_there_from_elsewhere(
    store: Any, seen_from: Callable[[str], None]
) -> None:
    saver = Saver()
    seen_from("a")
    one(0, store, read_link({"ASYNC_CKPT_LEAD": "tcp://10.9.9.9:7000"})).meet(saver, 5.0)
    assert saver.asked[0].address == "10.9.9.9:7000"
    seen_from("b")
    lead = one(2, store, read_link({"ASYNC_CKPT_LEAD": "tcp://gateway:80"})).meet(saver, 5.0)[1]
    assert lead is not None
    assert lead.endpoint == "tcp://gateway:80"
    lead = one(2, store, read_link({"ASYNC_CKPT_LEAD": "tcp://10.9.9.9:0"})).meet(saver, 5.0)[1]
    assert lead is not None
    assert lead.endpoint == "tcp://10.9.9.9:7000"


def test_without_a_store_the_environment_says_it_all(tmp_path: Path) -> None:
    public, secret = generate(tmp_path / "job")
    keys = {"ASYNC_CKPT_CURVE_SECRET": str(secret), "ASYNC_CKPT_CURVE_SERVER": str(public)}
    here = read_link({**keys, "ASYNC_CKPT_LEAD": "tcp://127.0.0.1:7000"})
    afar = read_link({**keys, "ASYNC_CKPT_LEAD": "tcp://[2001:db8::1]:7000"})
    assert here.complete
    saver = Saver(key=read_public(public))
    assert one(0, None, here).meet(saver, 5.0) == ("job:1", None)
    assert one(1, None, here).meet(saver, 5.0) == ("job:1", None)
    own = read_secret(secret)
    expected = Lead("tcp://[2001:db8::1]:7000", own.public, own.public, own.secret)
    assert one(2, None, afar).meet(saver, 5.0) == ("job:1", expected)
    with pytest.raises(CheckpointError, match="another key than the one in"):
        one(0, None, here).meet(Saver(), 5.0)


@pytest.mark.parametrize(
    ("environment", "complete"),
    [
        ({}, False),
        ({"ASYNC_CKPT_LEAD": "tcp://10.0.0.1:5591"}, False),
        ({"ASYNC_CKPT_LINK": "plain"}, False),
        ({"ASYNC_CKPT_LEAD": "tcp://10.0.0.1:0", "ASYNC_CKPT_LINK": "plain"}, False),
        ({"ASYNC_CKPT_LEAD": "tcp://10.0.0.1:5591", "ASYNC_CKPT_LINK": "plain"}, True),
    ],
)
def test_what_is_not_said_has_to_be_asked_for(environment: dict[str, str], complete: bool) -> None:
    assert read_link(environment).complete is complete


@pytest.mark.parametrize(
    "environment",
    [
        {"ASYNC_CKPT_LINK": "none"}, {"ASYNC_CKPT_LEAD": "10.0.0.1:5591"}, {"ASYNC_CKPT_LEAD": "tcp://10.0.0.1"},
        {"ASYNC_CKPT_LEAD": "tcp://10.0.0.1:65536"}, {"ASYNC_CKPT_LEAD": "tcp://:1"},
        {"ASYNC_CKPT_LEAD": "ipc:///x"}, {"ASYNC_CKPT_CURVE_SECRET": "/nowhere"},
    ],
)  # fmt: skip
def test_what_the_environment_should_not_say_is_named(environment: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(environment.values())).replace("/", "[/]")):
        read_link(environment)


# --- restore -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoint-5"
    path.mkdir(parents=True)
    (path / "async_ckpt.json").write_text("{}")
    return path


def test_a_checkpoint_that_one_rank_does_not_see_is_refused_by_all(
    store: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "_VISIBLE_S", 0.0)
    ranks = [one(rank, store) for rank in range(4)]

    def look(rank: int) -> str:
        try:
            ranks[rank].all_see(checkpoint if rank != 2 else checkpoint / "elsewhere", 30.0)
        except CheckpointError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(look, range(4)))
        assert len({*said}) == 1
        assert f"rank 2 on host {socket.gethostname()} sees no checkpoint at {checkpoint}" in said[0]
        ranks[2].all_see = lambda path, timeout_s: Hosts.all_see(ranks[2], checkpoint, timeout_s)  # type: ignore[method-assign]
        assert list(pool.map(lambda rank: ranks[rank].all_see(checkpoint, 30.0), range(4))) == [None] * 4


def test_ranks_that_want_different_checkpoints_are_told_so(store: Any, checkpoint: Path) -> None:
    """As when each has looked for the newest one by itself, while it was being committed."""
    later = checkpoint.with_name("checkpoint-6")
    later.mkdir()
    (later / "async_ckpt.json").write_text("{}")
    ranks = [one(rank, store) for rank in range(4)]

    def look(rank: int) -> str:
        try:
            ranks[rank].all_see(checkpoint if rank == 3 else later, 30.0)
        except CheckpointError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(look, range(4)))
    assert said[0] == said[1] == said[2]
    assert "3 of 4 ranks want to restore checkpoint-6" in said[0]
    assert "1 of 4 ranks want to restore checkpoint-5" in said[3]


def test_a_checkpoint_may_become_visible_late(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = checkpoint.rename(checkpoint.with_name("hidden"))
    naps: list[float] = []

    def nap(pause_s: float) -> None:
        naps.append(pause_s)
        if len(naps) == 3:
            hidden.rename(checkpoint)

    monkeypatch.setattr(hosts.time, "sleep", nap)
    one(1, None).all_see(checkpoint, 5.0)
    assert len(naps) == 3


def test_a_rank_that_never_comes_to_restore_is_counted(
    store: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "_VISIBLE_S", 0.0)
    with pytest.raises(CheckpointError, match="1 of 4 ranks have come to restore"):
        one(1, store).all_see(checkpoint, 0.05)


def test_without_a_store_each_rank_speaks_for_itself(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_VISIBLE_S", 0.0)
    one(1, None).all_see(checkpoint, 5.0)
    with pytest.raises(CheckpointError, match="on a filesystem that they share"):
        one(1, None).all_see(checkpoint / "elsewhere", 5.0)
