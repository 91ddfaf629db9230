"""A rank that is not let in hears why, within its timeout."""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import zmq

from async_ckpt import connection
from async_ckpt.client import Client
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.keys import ClientKeys, generate, read_public, read_secret
from async_ckpt.core.protocol import Ack, FromSaver, Ping, Pong, Settled, Staged, decode_from_rank, encode
from async_ckpt.core.transport import transport_of
from tests.saver.doors import NOBODY, Doors, as_root
from tests.saver.hub_bench import stage
from tests.saver.saver_process import LAYOUT, SaverProcess, register


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ackpt-", dir="/tmp") as folder:
        yield Path(folder)


def attach(endpoint: str, directory: Path, keys: ClientKeys | None, timeout_s: float = 30.0) -> None:
    before = threading.active_count()
    client = Client(transport_of(endpoint), None, keys)
    try:
        client.register(register(directory), LAYOUT, timeout_s)
        client.ready(timeout_s)
    finally:
        client.close()
    assert threading.active_count() == before


def test_a_listed_key_comes_in_and_another_hears_why_not(home: Path) -> None:
    doors = Doors(home)
    stranger = ClientKeys(read_secret(generate(home / "stranger")[1]), read_public(doors.public))
    mistaken = ClientKeys(doors.keys.own, stranger.own.public)
    with doors.start():
        attach(doors.endpoint, home / "run", doors.keys)
        with pytest.raises(CheckpointError, match="does not allow this key: put the public key"):
            attach(doors.endpoint, home / "run", stranger)
        with pytest.raises(CheckpointError, match="somebody is there who does not know the key"):
            attach(doors.endpoint, home / "run", mistaken, timeout_s=1.0)
        with pytest.raises(CheckpointError, match="set ASYNC_CKPT_CURVE_SECRET"):
            attach(doors.endpoint, home / "run", None)


def test_a_directory_whose_name_is_no_text_is_refused_at_once(home: Path) -> None:
    with (
        SaverProcess(f"ipc://{home}/s", home, home / "log") as saver,
        pytest.raises(CheckpointError, match="not valid text"),
    ):
        attach(saver.endpoint, home / os.fsdecode(b"run-\xff"), None)


@as_root
def test_nothing_is_told_to_a_saver_of_another_user(home: Path) -> None:
    """Its directory comes to be while this rank waits for its saver."""
    client = Client(transport_of(f"ipc://{home}/d/s"), None)
    (home / "d").mkdir(mode=0o700)
    os.chown(home / "d", NOBODY, NOBODY)
    context = zmq.Context()
    impostor = context.socket(zmq.ROUTER)
    impostor.bind(f"ipc://{home}/d/s")
    heard: list[bytes] = []

    def answer() -> None:
        while impostor.poll(2000):
            identity, payload = impostor.recv_multipart()
            heard.append(payload)
            impostor.send_multipart([identity, encode(Pong(incarnation="x", known=False))])

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(CheckpointError, match=f"uid {NOBODY}"):
        client.register(register(home / "run"), LAYOUT, 10.0)
    client.close()
    thread.join()
    context.destroy(0)
    assert heard
    assert all(isinstance(decode_from_rank(payload), Ping) for payload in heard)


def test_a_settled_step_needs_no_other_acknowledgement(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one whose rank leaves before there is an outcome: what is said with the goodbye is answered at once."""
    monkeypatch.setattr(connection, "_REPEAT_S", 3600.0)
    outcomes: queue.SimpleQueue[Settled] = queue.SimpleQueue()
    heard: list[FromSaver] = []
    with SaverProcess(f"ipc://{home}/s", home, home / "log") as saver:
        client, other = (Client(transport_of(saver.endpoint), None) for _ in range(2))
        receive = client._receive

        def overhear(message: FromSaver) -> None:
            heard.append(message)
            receive(message)

        monkeypatch.setattr(client, "_receive", overhear)
        client.listen(on_settled=outcomes.put, on_lost=print, on_turn=lambda who: None, on_word=print)
        first = register(home / "run")
        options = msgspec.structs.replace(first.options, world=2)
        ranks = [msgspec.structs.replace(first, options=options, rank=rank) for rank in range(2)]
        with ThreadPoolExecutor() as threads:
            granted, _ = threads.map(lambda who, word: who.register(word, LAYOUT, 30.0), (client, other), ranks)
            list(threads.map(lambda each: each.ready(30.0), (client, other)))
        for rank, each in enumerate((client, other)):
            stage(granted, rank, 0, 1)
            each.report(lambda seq: Staged(seq=seq, slot=0, step=1, copy_s=0.0))
        assert outcomes.get(timeout=30).outcome == "committed"
        stage(granted, 0, 1, 2)
        client.report(lambda seq: Staged(seq=seq, slot=1, step=2, copy_s=0.0))
        assert not any(isinstance(message, Ack) for message in heard)
        client.close()
        assert [message.seq for message in heard if isinstance(message, Ack)] == [2, 3]
        assert client._outbox.all_acknowledged.is_set()
        other.close()
