"""What is no message, or no message now, is answered and counted, and ends nothing."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import zmq

from async_ckpt.core.protocol import Bye, Granted, Ping, Pong, Ready, Rejected, Skipped, Staged, Started, encode
from async_ckpt.core.slots import read_journals
from tests.ranks import ROOT
from tests.saver.saver_process import Peer, SaverProcess, register, until


def hostile_payloads(directory: Path) -> dict[str, bytes]:
    def spoilt(path: str, value: object) -> bytes:
        raw = msgspec.msgpack.decode(encode(register(directory)))
        *parents, last = path.split(".")
        inner = raw
        for name in parents:
            inner = inner[name]
        inner[last] = value
        return msgspec.msgpack.encode(raw)

    def staged(slot: int, step: int) -> bytes:
        return msgspec.msgpack.encode({"type": "Staged", "seq": 1, "slot": slot, "step": step, "copy_s": 0})

    whole = encode(register(directory))
    return {
        "noise": os.urandom(64),
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "unknown type": msgspec.msgpack.encode({"type": "Open"}),
        "a saver's word": encode(Pong(incarnation="x", known=True)),
        "a policy that is not allowed": spoilt("options.policy.keep_last", 0),
        "no text": msgspec.msgpack.encode({"type": "Ping", "unsettled": []}) + b"\xff",
        "nested": b"\x82\xa4type\xa4Ping\xa1z" + b"\x91" * 100_000 + b"\xc0",
        "a pid that cannot be": spoilt("process.pid", 2**40),
        "a time that is none": spoilt("options.timeout_s", float("nan")),
        "a step beyond any": staged(0, 2**63),
        "a slot before the first": staged(-1, 1),
    }


def test_what_is_no_message_is_answered_and_counted_and_ends_nothing(saver: SaverProcess, home: Path) -> None:
    payloads = hostile_payloads(home / "run")
    assert len(payloads) == 12
    with Peer(saver.endpoint) as peer:
        for number, (name, payload) in enumerate(payloads.items(), 1):
            peer.socket.send(payload)
            assert peer.hear(Rejected).reason, name
            if number <= 10:
                saver.rejected("unreadable", number)
        peer.socket.send_multipart([b"one", b"too many"])
        assert "3 frames" in peer.hear(Rejected).reason
        assert not peer.alive().known


def test_a_message_over_the_cap_ends_its_connection_and_nobody_elses(home: Path) -> None:
    """As a saver with a cap of 1 MiB, since 256 MiB would only take longer."""
    (home / "sitecustomize.py").write_text("from async_ckpt.core import limits\nlimits.MAX_MESSAGE_BYTES = 1 << 20\n")
    path = os.pathsep.join([str(home), str(ROOT), str(ROOT / "service")])
    with (
        SaverProcess(f"ipc://{home}/s", home, home / "log", env={"PYTHONPATH": path}) as saver,
        Peer(saver.endpoint) as honest,
        Peer(saver.endpoint) as peer,
    ):
        honest.alive()
        at_the_cap = encode(Ping(unsettled=[])) + b"\xc0" * ((1 << 20) - len(encode(Ping(unsettled=[]))))
        peer.socket.send(at_the_cap)
        assert peer.hear(Rejected)
        monitor = peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        peer.socket.send(at_the_cap + b"\xc0")
        assert monitor.poll(20_000), "the connection goes on"
        peer.socket.disable_monitor()
        honest.alive()


def test_words_that_make_no_sense_now_are_answered_and_counted(saver: SaverProcess, home: Path) -> None:
    with Peer(saver.endpoint) as peer:
        peer.say(Staged(seq=1, slot=0, step=1, copy_s=0.0))
        assert not peer.hear(Pong).known
        saver.rejected("unexpected")
        peer.say(register(home / "run"))
        peer.hear(Granted)
        peer.say(Staged(seq=2, slot=0, step=1, copy_s=0.0))
        assert "before the run has started" in peer.hear(Rejected).reason
        peer.say(Ready())
        peer.hear(Started)
        peer.say(register(home / "run", rank=1))
        assert "rank 0 says it is 1" in peer.hear(Rejected).reason
        peer.say(Skipped(seq=3, slot=2, step=1, reason="busy"))
        assert "slot 2 of 2" in peer.hear(Rejected).reason
        peer.socket.send(encode(Ping(unsettled=[])))
        peer.say(Bye(seq=4))
    until(lambda: list(read_journals(saver.endpoint)) == [], "the run's end")
    assert not (home / "run" / "checkpoint-1").exists()
