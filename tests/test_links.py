"""The job's own store, as ranks use it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from torch.distributed import TCPStore

from async_ckpt.core.errors import CheckpointError
from async_ckpt.links import Board, board_of_job

_SERVER = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def test_without_torch_distributed_there_is_none() -> None:
    assert board_of_job("x") is None


def test_what_was_put_is_there_for_all_until_the_store_is_gone() -> None:
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        board, other = (Board(TCPStore("127.0.0.1", port, is_master=False), "x") for _ in range(2))
        assert other.look("a") is None
        assert other.wait_for("a", 0.0) is None
        board.put("a", "caf\xe9".encode())
        assert other.wait_for("a", 5.0) == "caf\xe9".encode()
        assert (board.count("n", 2), other.count("n"), other.count("n", 1)) == (2, 2, 3)
        board.remove("a")
        assert other.look("a") is None
    finally:
        server.kill()
        server.communicate()
    calls: list[Callable[[], object]] = [
        lambda: board.look("a"), lambda: board.count("n"), lambda: board.remove("a"), lambda: board.wait_for("a", 5.0),
        lambda: board.put("a", b""),  # last: a first one is sent without being answered
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(CheckpointError, match="the job's own store"):
            call()
