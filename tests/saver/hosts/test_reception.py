"""A lead without sockets: the life of a rank behind a relay, whole, cut short, and with every word said twice."""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_ckpt.core.manifest import MANIFEST_NAME, read_manifest
from async_ckpt.core.protocol import Granted, Pong, Refused, Settled, Staged, encode
from async_ckpt.core.slots import SlotPaths
from async_ckpt_saver.hosts.link_words import (
    LINK_PROTOCOL,
    CopyGone,
    CopyOffered,
    Held,
    Hello,
    Offer,
    Opened,
    Share,
    Wanted,
    decode_from_relay,
    encode_word,
)
from async_ckpt_saver.hosts.spans import Span, unpack
from tests.fuzz.links import FAR, HALF_BYTES, NEAR, FuzzedLead, half, joined, near_stages, numbered, split, words
from tests.saver.saver_process import FILE, LAYOUT


@pytest.mark.parametrize("twice", [False, True])
def test_the_life_of_a_rank_behind_a_relay(tmp_path: Path, twice: bool) -> None:
    lead = FuzzedLead(tmp_path)
    content = secrets.token_bytes(HALF_BYTES)
    try:
        lead.receive(NEAR, encode(half(tmp_path / "run", 0)))
        for number, (lane, word, payload) in enumerate(numbered(words(tmp_path / "run", content))):
            for _ in range(1 + twice):
                lead.hear(b"lane-%d" % lane, word, payload)
            lead.settle()
            if number == 5:  # all of step 1 is there
                near_stages(lead, 1)
                lead.receive(NEAR, encode(Staged(seq=1, slot=0, step=1, copy_s=0.0)))
                lead.settle(0.2)
        opened = [word for word in lead.told if isinstance(word, Opened)]
        assert [word.layout for word in opened] == [LAYOUT]
        share = next(word for word in lead.told if isinstance(word, Share))
        own = Span(0, len(FILE.header) + HALF_BYTES, FILE.total_bytes)
        assert unpack(share.spans, [FILE.total_bytes]) == [own]
        transfer = [type(word) for word in lead.told if isinstance(word, Wanted | Held)]
        assert transfer == [Wanted, Held]
        path = tmp_path / "run/checkpoint-1"
        assert (path / FILE.path).read_bytes() == FILE.header + bytes(HALF_BYTES) + content
        assert set(read_manifest(path).files) == {FILE.path, "README.md", "rank-1.json"}
        heard = lead.heard_by_ranks()
        assert [(each.step, each.outcome) for each in heard if isinstance(each, Settled)][:2] == [
            (1, "committed"), (1, "committed")]  # fmt: skip
        assert [each.known for each in heard if isinstance(each, Pong)][-1] is False  # it has left
        assert sum(lead.services.rejections.counts.values()) == 0
        assert lead.services.relayed_bytes == HALF_BYTES
        (offered,) = [word for word in lead.told if isinstance(word, CopyOffered)]
        assert offered.manifest == (path / MANIFEST_NAME).read_bytes()
        (gone,) = [word for word in lead.told if isinstance(word, CopyGone)]
        assert gone.digest == bytes(16)  # of which there is none
    finally:
        lead.close()


def test_what_an_earlier_relay_had_under_way_disturbs_the_transfer_of_its_successor_no_more(tmp_path: Path) -> None:
    lead = FuzzedLead(tmp_path)
    content = secrets.token_bytes(HALF_BYTES)
    try:
        lead.receive(NEAR, encode(half(tmp_path / "run", 0)))
        frames = list(numbered(words(tmp_path / "run", content)))
        for lane, word, payload in frames[:4]:  # until the run has started
            lead.hear(b"old-%d" % lane, word, payload)
            lead.settle()
        offer, piece = (decode_from_relay(frames[n][1]) for n in (4, 5))
        assert isinstance(offer, Offer)
        for lane in (0, 1):
            hello = Hello(protocol=LINK_PROTOCOL, session=bytes(range(16)), lane=lane, host="boot:1", name="b")
            lead.hear(b"new-%d" % lane, encode_word(hello))
        lead.hear(b"new-0", encode_word(msgspec.structs.replace(offer, seq=1)))
        rejected = lead.services.rejections.counts["unexpected"]
        lead.hear(b"old-0", frames[4][1])  # it had been waiting in a socket
        assert lead.services.rejections.counts["unexpected"] == rejected + 1
        lead.hear(b"new-1", encode_word(msgspec.structs.replace(piece, seq=1)), content)
        assert [type(word) for word in lead.told if isinstance(word, Wanted | Held)][:2] == [Wanted, Held]
        near_stages(lead, 1)
        lead.receive(NEAR, encode(Staged(seq=1, slot=0, step=1, copy_s=0.0)))
        lead.settle(0.2)
        assert (tmp_path / "run/checkpoint-1" / FILE.path).read_bytes()[-HALF_BYTES:] == content
    finally:
        lead.close()


def test_a_job_that_is_refused_is_refused_behind_the_relay_too(tmp_path: Path) -> None:
    lead = FuzzedLead(tmp_path)
    try:
        lead.receive(NEAR, encode(half(tmp_path / "run", 0)))
        frames = list(numbered(words(tmp_path / "other")))
        for lane, word, payload in frames[:3]:
            lead.hear(b"lane-%d" % lane, word, payload)
        lead.receive(NEAR, encode(half(tmp_path.parent, 0)))  # below no root
        assert any(isinstance(answer, Refused) for answer in lead.answers)
        lead.hub.remote_gone(FAR)
        lead.settle()
        assert any(
            isinstance(each, Refused) and "died while attaching" in each.reason for each in lead.heard_by_ranks()
        )
    finally:
        lead.close()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 4000), st.binary(min_size=1, max_size=6), st.integers(0, 11))
def test_a_conversation_with_damaged_bytes_raises_nothing_and_touches_nobody_elses(
    tmp_path_factory: pytest.TempPathFactory, position: int, damage: bytes, swapped: int
) -> None:
    root = tmp_path_factory.mktemp("root")
    lead = FuzzedLead(root)
    try:
        lead.receive(NEAR, encode(half(root / "run", 0)))
        frames = list(numbered(words(root / "run")))
        frames[swapped], frames[-1] = frames[-1], frames[swapped]
        data = bytearray(joined(iter(frames)))
        position %= len(data)
        data[position : position + len(damage)] = damage
        for lane, word, payload in split(bytes(data)):
            lead.hear(b"lane-%d" % lane, word, payload)
            lead.settle()
        assert not list(root.glob("**/async_ckpt.json"))
        for granted in (answer for answer in lead.answers if isinstance(answer, Granted)):
            image = SlotPaths(Path(granted.run), 0).image / FILE.path
            if image.exists():
                assert image.read_bytes()[: len(FILE.header) + HALF_BYTES] == FILE.header + bytes(HALF_BYTES)
    finally:
        lead.close()
