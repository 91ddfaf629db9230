"""Who is let in to a link, and what a relay may say there: wrong keys, none, noise, lies about ranks and bytes."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import xxhash
import zmq

from async_ckpt.core.keys import generate
from async_ckpt.core.protocol import (
    Lead,
    LeadOpen,
    LeadWanted,
    Ping,
    Refused,
    Register,
    Rejected,
    Staged,
    Started,
    StatusWanted,
    decode_from_saver,
    encode,
)
from async_ckpt.core.slots import links_path
from async_ckpt_saver.hosts.dialler import PIECE_LANES
from async_ckpt_saver.hosts.link_words import (
    LINK_PROTOCOL,
    Beat,
    FromLead,
    FromRelay,
    Held,
    Hello,
    Left,
    Offer,
    Piece,
    Said,
    Say,
    Stranger,
    Tell,
    Unwelcome,
    Welcome,
    decode_from_lead,
    encode_word,
)
from async_ckpt_saver.hosts.spans import EDGE_PIECE_BYTES
from async_ckpt_saver.status import decode_status
from tests.saver.hosts.two_hosts import FILE, Host, Job, Rank, content, hosts, possible
from tests.saver.saver_process import Peer, SaverProcess, register, until

T = TypeVar("T", bound=msgspec.Struct)
pytestmark = pytest.mark.skipif(not possible(), reason="needs the right to make mount namespaces (root)")


class FalseRelay:
    """One lane, and whatever it is told to say."""

    def __init__(self, lead: Lead, host: str = "boot:7") -> None:
        self._context = zmq.Context(1)
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        if lead.server_key:
            self.socket.set(zmq.CURVE_SERVERKEY, lead.server_key)
            self.socket.set(zmq.CURVE_PUBLICKEY, lead.public_key)
            self.socket.set(zmq.CURVE_SECRETKEY, lead.secret_key)
        self.socket.connect(lead.endpoint)
        self._host = host
        self._seq = 0

    def say(self, word: FromRelay, payload: bytes | None = None) -> None:
        if isinstance(word, Said):
            self._seq += 1
            word = msgspec.structs.replace(word, seq=self._seq)
        self.socket.send_multipart([encode_word(word), *([payload] if payload is not None else [])])

    def hear(self, kind: type[T], timeout_s: float = 20.0) -> T:
        heard: list[FromLead] = []

        def found() -> bool:
            if self.socket.poll(10):
                heard.append(decode_from_lead(self.socket.recv()))
            return bool(heard) and isinstance(heard[-1], kind)

        until(found, f"a {kind.__name__}", timeout_s)
        assert isinstance(heard[-1], kind)
        return heard[-1]

    def hear_rejected(self, word: Said, payload: bytes | None = None) -> str:
        """What the lead answers to it."""
        self.say(word, payload)
        while not isinstance(answer := decode_from_saver(self.hear(Tell).payload), Rejected):
            pass
        return answer.reason

    def greet(self, **changes: object) -> FalseRelay:
        hello = Hello(protocol=LINK_PROTOCOL, session=secrets.token_bytes(16), lane=0, host=self._host, name="false")
        self.say(msgspec.structs.replace(hello, **changes))
        return self

    def close(self) -> None:
        self._context.destroy(0)


def rejections(host: Host) -> dict[str, int]:
    with Peer(host.endpoint) as peer:
        peer.say(StatusWanted())
        from async_ckpt.core.protocol import Status

        return dict(decode_status(peer.hear(Status).report).rejected_messages)


def test_a_relay_whose_key_is_not_allowed_does_not_get_in_and_its_ranks_hear_why(folder: Path) -> None:
    with hosts(folder, folder / "root") as (lead, relay):
        near, far = Rank(lead, 0, 2, folder / "root/run"), Rank(relay, 1, 2, folder / "root/run")
        try:
            public, secret = zmq.curve_keypair()
            far.register(msgspec.structs.replace(near.lead(), public_key=public, secret_key=secret))
            assert "does not allow this job's key" in far.peer.hear(Refused).reason
            until(lambda: rejections(lead)["unknown_key"] > 0, "the key is counted")
        finally:
            near.close()
            far.close()


@pytest.mark.parametrize("wrong", ["server key", "no keys"])
def test_a_relay_with_the_wrong_keys_is_told_nothing(folder: Path, wrong: str) -> None:
    with hosts(folder, folder / "root", "a") as (host,):
        rank = Rank(host, 0, 2, folder / "root/run")
        lead = rank.lead()
        if wrong == "no keys":
            lead = Lead(lead.endpoint, b"", b"", b"")
        else:
            lead = msgspec.structs.replace(lead, server_key=zmq.curve_keypair()[0])
        stranger = FalseRelay(lead).greet()
        try:
            until(lambda: rejections(host)["handshake"] > 0, "the handshake is counted")
            assert not stranger.socket.poll(200)
        finally:
            stranger.close()
            rank.close()


def test_the_savers_own_list_holds_for_links_as_well(folder: Path) -> None:
    """With `--curve-secret` its own key is the one that the others see, and nobody has to bring one."""
    for name in ("saver", "relay"):
        generate(folder / name)
    allow = folder / "allow"
    allow.mkdir(mode=0o700)
    (folder / "relay.key").rename(allow / "relay.key")
    public, secret = zmq.auth.load_certificate(folder / "relay.key_secret")
    (folder / "s").mkdir(mode=0o700)
    options = ("--curve-secret", str(folder / "saver.key_secret"), "--curve-allow", str(allow))
    endpoint = f"ipc://{folder}/s/saver.sock"
    with SaverProcess(endpoint, folder, folder / "log", *options), Peer(endpoint) as rank:
        rank.say(LeadWanted(address="127.0.0.1:0", allow=b""))
        opened = rank.hear(LeadOpen)
        assert opened.server_key == zmq.auth.load_certificate(folder / "saver.key")[0]
        relay = FalseRelay(Lead(opened.endpoint, opened.server_key, public, secret or b"")).greet()
        try:
            assert relay.hear(Welcome).incarnation
        finally:
            relay.close()
        rank.say(LeadWanted(address="127.0.0.1:0", allow=b""))
        assert rank.hear(LeadOpen) == opened  # asked again it is answered alike
    links_path(endpoint).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("address", "said"),
    [("nowhere:0", "give the IP address"), ("127.0.0.1", "give the IP address"), ("127.0.0.1:70000", "give the IP"),
     ("192.0.2.1:0", "it is no address of this host"), ("::1:0", "give the IP")],
)  # fmt: skip
def test_an_address_that_cannot_be_listened_on_is_refused(folder: Path, address: str, said: str) -> None:
    with hosts(folder, folder / "root", "a") as (host,), Peer(host.endpoint) as rank:
        rank.say(LeadWanted(address=address, allow=b"k" * 40))
        assert said in rank.hear(Refused).reason


@pytest.mark.full
def test_a_port_that_accepts_and_says_nothing_costs_one_try(folder: Path) -> None:
    """The next one finds the lead, before this host's patience of 25 s is over."""
    silent = socket.create_server(("127.0.0.1", 0))
    silent.settimeout(30)
    port = silent.getsockname()[1]
    taken: list[socket.socket] = []
    with hosts(folder, folder / "root") as made:
        near, far = (Rank(host, n, 2, folder / "root/run", timeout_s=25.0) for n, host in enumerate(made))
        try:
            far.register(Lead(f"tcp://127.0.0.1:{port}", b"", b"", b""))
            taken += [silent.accept()[0] for _ in range(1 + PIECE_LANES)]
            silent.close()  # who was accepted stays so
            near.lead(f"127.0.0.1:{port}", plain=True)
            near.register()
            for rank in (near, far):
                rank.ready()
            for rank in (near, far):
                rank.peer.hear(Started)
        finally:
            near.close()
            far.close()
            for each in [silent, *taken]:
                each.close()


def test_noise_and_other_versions_change_nothing(folder: Path) -> None:
    with hosts(folder, folder / "root", "a") as (host,):
        rank = Rank(host, 0, 2, folder / "root/run")
        relay = FalseRelay(rank.lead(plain=True))
        try:
            relay.say(Beat(sent=0, received=0))
            relay.hear(Stranger)
            relay.greet(protocol=99)
            assert "install the same async-ckpt version" in relay.hear(Unwelcome).reason
            relay.socket.send(b"noise")
            relay.socket.send_multipart([b"a", b"b", b"c", b"d"])
            until(lambda: rejections(host)["unreadable"] >= 2, "noise is counted")
            relay.greet().hear(Welcome)
            relay.say(Say(identity=b"r", payload=b"noise"))
            assert decode_from_saver(relay.hear(Tell).payload).reason  # type: ignore[union-attr]
            for message in (StatusWanted(), Staged(seq=1, slot=0, step=1, copy_s=0.0)):
                assert "nothing that is relayed" in relay.hear_rejected(Say(identity=b"r", payload=encode(message)))
            for word in (Left(identity=b"r"), Offer(identity=b"r", slot=0, step=1, copy_s=0, stall_s=0, record=None),
                         Piece(identity=b"r", step=1, number=0, xxh3=0)):  # fmt: skip
                assert "of a rank that is not this relay's" in relay.hear_rejected(word, b"x")
            assert rank.peer.alive().incarnation  # nobody else has noticed
        finally:
            relay.close()
            rank.close()


def _offer(who: bytes, slot: int, step: int, record: bytes | None = None) -> Offer:
    return Offer(identity=who, slot=slot, step=step, copy_s=0, stall_s=0, record=record)


def lies() -> list[tuple[str, Callable[[bytes], Said], bytes | None, str]]:
    """About step 5, which has been offered, of a rank that is the relay's."""
    digest = xxhash.xxh3_64_intdigest
    return [
        ("slot", lambda who: _offer(who, 9, 7), None, "slot 9 of 2"),
        ("back", lambda who: _offer(who, 1, 4), None, "holds step 5"),
        ("record", lambda who: _offer(who, 0, 7, b"?"), None, "record"),
        ("number", lambda who: Piece(identity=who, step=5, number=99, xxh3=0), b"x", "piece 99 of"),
        ("size", lambda who: Piece(identity=who, step=5, number=0, xxh3=digest(b"x")), b"x", "of 1 bytes, not"),
        ("nothing", lambda who: Piece(identity=who, step=5, number=0, xxh3=0), None, "without its bytes"),
        (
            "no hash",
            lambda who: Piece(identity=who, step=5, number=0, xxh3=None),
            bytes(EDGE_PIECE_BYTES),
            "without a hash",
        ),
        ("hash", lambda who: Piece(identity=who, step=5, number=0, xxh3=1), bytes(EDGE_PIECE_BYTES), "does not hash"),
    ]


def test_lies_about_bytes_are_answered_and_change_nothing(folder: Path) -> None:
    """A relay goes wrong: after its own saver was killed, another one speaks for its rank. What it may say of a step
    can make that step fail, and no other."""
    with hosts(folder, folder / "root") as made:
        job = Job(made, folder / "root/run", plain=True).start()
        relay = FalseRelay(job.lead, host=made[1].shm)
        try:
            for rank in job.ranks:
                rank.stage(1)
            job.committed(1)
            identity = bytes(job.ranks[1].peer.socket.get(zmq.IDENTITY))
            made[1].kill()
            relay.greet().hear(Welcome)
            relay.say(_offer(identity, 1, 5))
            before = rejections(made[0])["unexpected"]
            for number, (name, lie, payload, said) in enumerate(lies(), 1):
                assert said in relay.hear_rejected(lie(identity), payload), name
                assert rejections(made[0])["unexpected"] == before + number, name
            job.ranks[0].stage(5, 1)
            settled = job.ranks[0].settled(5)
            assert (settled.outcome, "damaged on its way" in settled.reason) == ("failed", True)
            made[1].start()
            for rank in job.ranks:
                rank.stage(6)
            job.committed(6)
            assert (job.directory / "checkpoint-1" / FILE.path).read_bytes() == content(1)
        finally:
            relay.close()
            job.close()


def test_a_relay_speaks_for_its_own_ranks_only(folder: Path) -> None:
    with hosts(folder, folder / "root", "abc") as made:
        job = Job(made, folder / "root/run", plain=True).start()
        relay = FalseRelay(job.lead, host=made[2].shm).greet()
        try:
            relay.hear(Welcome)
            near, far = (bytes(rank.peer.socket.get(zmq.IDENTITY)) for rank in job.ranks[:2])
            for identity in (near, far):
                for word in (Left(identity=identity), Say(identity=identity, payload=encode(Ping(unsettled=[])))):
                    assert "not this relay's" in relay.hear_rejected(word)
                other: Register = register(folder / "root/run")
                assert "another's" in relay.hear_rejected(Say(identity=identity, payload=encode(other)))
            for rank in job.ranks:
                rank.stage(1)
            job.committed(1)
            relay.say(_offer(far, 0, 9))
            relay.hear(Held)  # as nothing of it is wanted
        finally:
            relay.close()
            job.close()
