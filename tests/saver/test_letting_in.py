"""Nobody gets in: a real saver, and peers that should not be heard by it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.keys import ClientKeys, generate, read_public, read_secret
from async_ckpt.core.protocol import Bye, Ping, Refused, Rejected, SaveRecord, Settled, encode
from async_ckpt.core.slots import Phase, SlotPaths, StateFile, read_journals
from async_ckpt.core.transport import transport_of
from async_ckpt_saver.cli import main
from async_ckpt_saver.exit_codes import IN_USE
from tests.saver.doors import NOBODY, Doors, as_root, free_port
from tests.saver.saver_process import LAYOUT, Peer, SaverProcess, register, until

_AS_NOBODY = """
import os, sys, zmq
os.setuid(65534)
sys.path[:0] = sys.argv[2:]
context = zmq.Context(); socket = context.socket(zmq.DEALER)
socket.set(zmq.LINGER, 0)
socket.connect(sys.argv[1])
socket.send(bytes.fromhex(sys.stdin.read()))
print(socket.poll(1500))
"""


def say_as_nobody(endpoint: str, payload: bytes) -> str:
    """What a process of another user heard in 1.5 s: "0" for nothing."""
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, endpoint], input=payload.hex(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@as_root
def test_another_user_is_not_heard_though_the_directory_was_opened_up(saver: SaverProcess, home: Path) -> None:
    ping = encode(Ping(unsettled=[]))
    assert say_as_nobody(saver.endpoint, ping) == "0"
    assert "rejected" not in saver.said(), "it did not even get to the socket"
    home.chmod(0o777)
    (home / "s").chmod(0o666)
    assert say_as_nobody(saver.endpoint, ping) == "0"
    saver.rejected("foreign_user")
    with Peer(saver.endpoint, trusting=True) as peer:
        peer.alive()
    with pytest.raises(CheckpointError, match="must be a directory of uid 0 with mode 0700"):
        Peer(saver.endpoint)


@as_root
def test_a_rank_that_names_a_process_of_another_user_is_refused(saver: SaverProcess, home: Path) -> None:
    code = "import os; os.setuid(65534); print('up', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    with Peer(saver.endpoint) as peer:
        from async_ckpt.core.processes import process_of

        peer.say(register(home / "run", process=process_of(child.pid)))
        assert f"process {child.pid} belongs to uid {NOBODY}" in peer.hear(Refused).reason
        saver.rejected("foreign_user")
    child.kill()
    child.communicate()


def test_a_rank_that_names_no_process_is_refused(saver: SaverProcess, home: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    me = register(home / "run").process
    for process in (
        msgspec.structs.replace(me, pid=gone.pid),
        msgspec.structs.replace(me, start_ticks=me.start_ticks - 1),
    ):
        with Peer(saver.endpoint) as peer:
            peer.say(register(home / "run", job=str(process), process=process))
            assert "died while attaching" in peer.hear(Refused).reason


def test_a_rank_that_sees_other_shared_memory_is_refused(saver: SaverProcess, home: Path) -> None:
    with Peer(saver.endpoint) as peer:
        peer.say(register(home / "run", shm="another-boot:1"))
        assert "does not see the /dev/shm" in peer.hear(Refused).reason
        saver.rejected("foreign_host")
    assert not (home / "run").exists()


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1777, 0o710])
def test_a_socket_where_others_come_in_is_refused(home: Path, mode: int, capsys: pytest.CaptureFixture[str]) -> None:
    open_to_others = home / "d"
    open_to_others.mkdir()
    open_to_others.chmod(mode)
    assert main(["run", "--bind", f"ipc://{open_to_others}/s", "--root", str(home)]) == 1
    assert "with mode 0700" in capsys.readouterr().err
    assert list(open_to_others.iterdir()) == []


@as_root
def test_a_directory_that_another_user_made_first_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = home / "d"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, NOBODY, NOBODY)
    assert main(["run", "--bind", f"ipc://{theirs}/s", "--root", str(home)]) == 1
    assert f"it has uid {NOBODY}" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=f"uid {NOBODY}"):
        Peer(f"ipc://{theirs}/s")


def test_a_link_is_no_private_directory(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "real").mkdir(mode=0o700)
    (home / "d").symlink_to(home / "real")
    assert main(["run", "--bind", f"ipc://{home}/d/s", "--root", str(home)]) == 1
    assert "with mode 0700" in capsys.readouterr().err


def test_a_client_whose_key_is_listed_is_served_and_another_is_not(doors: Doors) -> None:
    stranger = ClientKeys(read_secret(generate(doors.home / "stranger")[1]), doors.keys.server)
    mistaken = ClientKeys(doors.keys.own, stranger.own.public)
    with doors.start() as saver:
        assert "allowed: client" in saver.said()
        with Peer(doors.endpoint, doors.keys) as peer:
            peer.alive()
        for keys, cause in ((stranger, "unknown_key"), (mistaken, "handshake")):
            with Peer(doors.endpoint, keys) as peer:
                peer.say(Ping(unsettled=[]))
                saver.rejected(cause)
                assert not peer.socket.poll(0)
        with Peer(doors.endpoint, trusting=True) as peer:  # speaks without keys
            peer.say(Ping(unsettled=[]))
            saver.rejected("handshake", saver.said().count("(handshake") + 1)
            assert not peer.socket.poll(0)
        with Peer(doors.endpoint, doors.keys) as peer:
            peer.alive()


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "[::1]"])
def test_tcp_without_keys_is_never_served(home: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--bind", f"tcp://{address}:{free_port()}", "--root", str(home)]) == 1
    assert "keygen" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="ASYNC_CKPT_CURVE_SECRET"):
        Peer(f"tcp://{address}:5591")


@pytest.mark.parametrize("bind", ["ipc", "tcp"])
def test_a_second_saver_is_refused_and_harms_nothing(doors: Doors, bind: str) -> None:
    endpoint = doors.endpoint if bind == "tcp" else f"ipc://{doors.home}/s"
    first = SaverProcess(endpoint, doors.home, doors.home / "log", *doors.options)
    with first, Peer(endpoint, doors.keys) as peer:
        peer.alive()
        second = SaverProcess(endpoint, doors.home, doors.home / "log2", *doors.options)
        assert second.process.wait(30) == IN_USE
        assert f"pid {first.process.pid}" in second.said()
        peer.alive()
        with Peer(endpoint, doors.keys) as another:
            another.alive()


def test_a_port_under_another_name_is_in_use_as_well(doors: Doors) -> None:
    other_name = doors.endpoint.replace("127.0.0.1", "0.0.0.0")
    with doors.start():
        second = SaverProcess(other_name, doors.home, doors.home / "log2", *doors.options)
        assert second.process.wait(30) == IN_USE
        assert "in use" in second.said()


def test_a_run_over_tcp_is_taken_up_by_the_next_saver_of_that_address(doors: Doors) -> None:
    saver = doors.start().up()
    with Peer(doors.endpoint, doors.keys) as peer:
        granted = peer.start(doors.home / "run")
        saver.kill()
        paths = SlotPaths(Path(granted.run), 0)
        paths.write_record(0, SaveRecord(3, {}, None, {}))
        state = StateFile(paths.state)
        state.mark(0, Phase.STAGED, 3)
        state.close()
        with doors.start() as saver:
            peer.say(Ping(unsettled=[3]))
            settled = peer.hear(Settled)
            assert (settled.step, settled.outcome) == (3, "committed")
            peer.say(Bye(seq=1))
            until(lambda: list(read_journals(doors.endpoint)) == [], "the run's end")
    assert (doors.home / "run" / "checkpoint-3").is_dir()


def test_keys_that_others_can_read_or_add_to_are_refused(doors: Doors, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run", "--bind", doors.endpoint, "--root", str(doors.home), *doors.options]
    for path, mode, words in (
        (doors.secret, 0o640, "can be read by others (mode 0640): chmod 600"),
        (doors.home / "allow", 0o770, "others may write to"),
    ):
        before = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode)
        assert main(run) == 1
        assert words in capsys.readouterr().err
        path.chmod(before)
    for key in (doors.home / "allow").iterdir():
        key.unlink()
    assert main(run) == 1
    assert "nobody could connect" in capsys.readouterr().err


def test_keygen_makes_a_pair_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    umask = os.umask(0)
    try:
        assert main(["keygen", str(home / "node")]) == 0
    finally:
        os.umask(umask)
    assert capsys.readouterr().out.split() == [str(home / "node.key"), str(home / "node.key_secret")]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.iterdir()} == {
        "node.key": 0o644, "node.key_secret": 0o600}  # fmt: skip
    pair = read_secret(home / "node.key_secret")
    assert read_public(home / "node.key") == pair.public
    assert pair.secret.decode() not in repr(pair)
    before = {path: path.read_bytes() for path in home.iterdir()}
    assert main(["keygen", str(home / "node")]) == 1
    assert "never overwritten" in capsys.readouterr().err
    (home / "node.key_secret").unlink()
    assert main(["keygen", str(home / "node")]) == 1, "a public key of that name is there"
    assert {path: path.read_bytes() for path in home.iterdir()} == {home / "node.key": before[home / "node.key"]}


@pytest.mark.parametrize(
    "endpoint",
    ["", "ipc://relative", "ipc://", "tcp://127.0.0.1", "tcp://:5591", "tcp://127.0.0.1:0", "tcp://h:65536", "udp://h:1",
     "tcp://h:٣", "ipc:///" + "x" * 101],
)  # fmt: skip
def test_what_is_no_address_says_what_one_is(endpoint: str) -> None:
    with pytest.raises(CheckpointError, match=r"give ipc://|give tcp://|too long"):
        transport_of(endpoint)


def test_layouts_of_ranks_are_taken_only_when_asked_for(saver: SaverProcess, home: Path) -> None:
    from async_ckpt.core.protocol import LayoutSent, Options
    from async_ckpt.core.retention_policy import Policy

    options = Options(str(home / "run"), 2, 2, Policy(), 60.0)
    with Peer(saver.endpoint) as peer:
        peer.say(register(home / "run", options=options))
        peer.say(LayoutSent(layout=LAYOUT))
        assert "a LayoutSent of a rank that is attaching" in peer.hear(Rejected).reason
        peer.say(register(home / "run", options=options, rank=1, job="other"))
