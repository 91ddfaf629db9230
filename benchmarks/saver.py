"""The saver by itself: how soon it answers, what it costs while nothing happens, its memory at several sizes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import zmq

from async_ckpt.core.protocol import Ping, Pong, decode_from_saver, encode
from async_ckpt_saver.writer import CommitJob, commit

from . import measure, scale

_SPAWNS = 7
_IDLE_RANKS = 8
_IDLE_S = 10.0
_PING_S = 1.0  # as a rank's client does it
_POLL_MS = 2


def saver_section(*, quick: bool) -> dict[str, Any]:
    sizes = (28, 560) if quick else (28, 560, 2240)
    memory = []
    for tensors in sizes:
        found = scale.simulate(_IDLE_RANKS, tensors=tensors, saves=3)
        memory.append({"title": f"{tensors} tensors", "uss": found["saved_uss"]})
    return {
        "spawn_s": [spawn() for _ in range(2 if quick else _SPAWNS)],
        "idle_cpu": idle_cpu(1.0 if quick else _IDLE_S),
        "idle_ranks": _IDLE_RANKS,
        "memory": memory,
        "commit_cpu_s_a_byte": commit_cpu(1 << 20 if quick else 128 << 20),
    }


def spawn() -> float:
    """Seconds from the start of the process to its first answer."""
    with tempfile.TemporaryDirectory(prefix="async-ckpt-spawn-") as home:
        context = zmq.Context(1)
        socket = context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RECONNECT_IVL, _POLL_MS)
        endpoint = f"ipc://{home}/saver.sock"
        command = [sys.executable, "-m", "async_ckpt_saver", "run", "--bind", endpoint, "--root", home]
        started_s = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        socket.connect(endpoint)
        socket.send(encode(Ping(unsettled=[])))
        answer = decode_from_saver(socket.recv())
        taken_s = time.perf_counter() - started_s
        assert isinstance(answer, Pong)
        socket.close()
        context.term()
        process.terminate()
        process.wait()
    return taken_s


def commit_cpu(nbytes: int, times: int = 5) -> float:
    """Seconds of CPU, all threads, for a byte that is committed: hashed twice and written."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as image, tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        (Path(image) / "data").write_bytes(os.urandom(1 << 20) * (nbytes >> 20))
        used_s = []
        for step in range(times):
            started_s = time.process_time()
            commit(CommitJob(directory, step, image, ("data",)))
            used_s.append(time.process_time() - started_s)
    return statistics.median(used_s) / nbytes


def idle_cpu(seconds: float) -> float:
    """The part of a core that the saver uses while its ranks only ping."""
    with tempfile.TemporaryDirectory(prefix="async-ckpt-idle-") as name:
        home = Path(name)
        saver = scale.Saver(home)
        try:
            senders = scale.Senders(saver, home, _IDLE_RANKS, 28)
            for command in ("hello", "register", "ready"):
                senders.do(command)
            time.sleep(_PING_S)
            cpu_s, started_s = saver.cpu_s(), time.perf_counter()
            while time.perf_counter() - started_s < seconds:
                senders.do("hello")
                time.sleep(_PING_S)
            used = (saver.cpu_s() - cpu_s) / (time.perf_counter() - started_s)
            senders.do("bye")
            senders.stop()
        finally:
            saver.stop()
    assert measure.cpu_s([saver.process.pid]) == 0.0, "it should have ended"
    return used
