"""The notify protocol of systemd, spoken by a real saver to a real socket."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_ckpt_saver.alive import answers
from async_ckpt_saver.notify import Notifier

ROOT = Path(__file__).resolve().parents[2]
_ALIVE = [sys.executable, "-m", "async_ckpt_saver.alive"]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "service")])
    return {**os.environ, "PYTHONPATH": path, **more}


@contextlib.contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """What systemd listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(30)
        yield listener


@contextlib.contextmanager
def saver(folder: Path, *options: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "async_ckpt_saver",
            "run",
            *options,
            "--bind",
            f"ipc://{folder}/s.sock",
            "--root",
            str(folder),
        ],
        env=environment(**variables),
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def told(listener: socket.socket) -> list[str]:
    return listener.recv(4096).decode().split("\n")


def waiting(listener: socket.socket) -> list[str]:
    """What has come and nobody has read yet."""
    found = []
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(listener.recv(4096).decode())
    listener.settimeout(30)
    return found


def is_quiet(listener: socket.socket) -> bool:
    """Whether nothing more comes in several watchdog intervals."""
    waiting(listener)
    listener.settimeout(3)
    try:
        listener.recv(4096)
    except TimeoutError:
        return True
    finally:
        listener.settimeout(30)
    return False


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short path: a socket's is limited to 100 bytes."""
    path = Path("/tmp") / f"ackpt-{secrets.token_hex(4)}"
    path.mkdir(mode=0o700)
    yield path
    subprocess.run(["rm", "-r", str(path)], check=True)


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_ready_when_it_can_be_reached_then_watchdog_then_stopping(folder: Path, kind: str) -> None:
    name = f"{folder}/notify" if kind == "path" else f"@ackpt-{secrets.token_hex(8)}"
    address = name if kind == "path" else "\0" + name[1:]
    with manager(address) as listener, saver(folder, NOTIFY_SOCKET=name, WATCHDOG_USEC="2000000") as process:
        ready, status = told(listener)
        assert ready == "READY=1"
        assert status == f"STATUS=serves ipc://{folder}/s.sock, root {folder}"
        assert (folder / "s.sock").is_socket()
        assert answers(f"ipc://{folder}/s.sock", 30)
        assert [told(listener) for _ in range(3)] == [["WATCHDOG=1"]] * 3
        process.terminate()
        while (last := told(listener)) == ["WATCHDOG=1"]:
            pass
        assert last == ["STOPPING=1", "STATUS=finishing the commits under way"]
        assert process.wait(30) == -signal.SIGTERM
        assert waiting(listener) == []


def test_a_loop_that_hangs_is_silent(folder: Path) -> None:
    with (
        manager(f"{folder}/notify") as listener,
        saver(folder, NOTIFY_SOCKET=f"{folder}/notify", WATCHDOG_USEC="1000000") as process,
    ):
        assert told(listener)[0] == "READY=1"
        assert told(listener) == ["WATCHDOG=1"]
        process.send_signal(signal.SIGSTOP)
        assert is_quiet(listener)
        done = subprocess.run([*_ALIVE, f"ipc://{folder}/s.sock"], env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, f"no saver answers at ipc://{folder}/s.sock within 3 s\n")
        process.send_signal(signal.SIGCONT)
        assert told(listener) == ["WATCHDOG=1"]
        done = subprocess.run([*_ALIVE, f"ipc://{folder}/s.sock"], env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_ready_is_not_said_by_a_saver_that_cannot_serve(folder: Path) -> None:
    with (
        manager(f"{folder}/notify") as listener,
        saver(folder) as first,
    ):
        deadline_s = time.monotonic() + 30
        while not (folder / "s.sock").exists():
            assert first.poll() is None
            assert time.monotonic() < deadline_s
        with saver(folder, NOTIFY_SOCKET=f"{folder}/notify") as second:
            assert second.wait(30) == 3
        assert waiting(listener) == []


def test_an_embedded_saver_does_not_speak_for_the_service_that_its_trainer_is(folder: Path) -> None:
    with (
        manager(f"{folder}/notify") as listener,
        saver(folder, "--embedded", NOTIFY_SOCKET=f"{folder}/notify", WATCHDOG_USEC="1000000"),
    ):
        assert answers(f"ipc://{folder}/s.sock", 30)
        assert waiting(listener) == []


@pytest.mark.parametrize(
    ("variables", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "10000000"}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_the_watchdog_is_for_the_process_that_is_watched(variables: dict[str, str], watchdog_s: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/nowhere", **variables}).watchdog_s == watchdog_s
    assert Notifier(variables).watchdog_s is None


def test_a_manager_that_is_gone_or_cannot_be_named_ends_nothing(tmp_path: Path) -> None:
    for name in ("", "/nowhere/at/all", "@" + "x" * 200, str(tmp_path)):
        notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000"})
        notifier.ready("here")
        notifier.alive(0.0)
        notifier.stopping()
