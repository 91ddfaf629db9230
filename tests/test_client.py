"""A rank that is not let in hears why, within its timeout."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from async_ckpt.client import Client
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.keys import ClientKeys, generate, read_public, read_secret
from async_ckpt.core.protocol import Ping, Pong, decode_from_rank, encode
from async_ckpt.core.transport import transport_of
from tests.saver.doors import NOBODY, Doors, as_root
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
