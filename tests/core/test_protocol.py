"""Messages survive the wire; anything else is an error, not a crash."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_ckpt.core.protocol import (
    Ack,
    Bye,
    Lead,
    Ping,
    Pong,
    Settled,
    Staged,
    decode_from_rank,
    decode_from_saver,
    encode,
)


def test_messages_survive_the_wire() -> None:
    for message in (Staged(seq=1, slot=0, step=2, copy_s=0.5), Bye(seq=3), Ping(unsettled=[1], not_uploaded=[2])):
        assert decode_from_rank(encode(message)) == message
    for answer in (Ack(seq=1), Pong(incarnation="x", known=True), Settled(step=1, slot=0, outcome="failed")):
        assert decode_from_saver(encode(answer)) == answer


def test_a_side_takes_only_what_the_other_says() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_from_rank(encode(Ack(seq=1)))
    with pytest.raises(msgspec.ValidationError):
        decode_from_saver(encode(Bye(seq=1)))


def test_a_link_has_all_keys_or_none_and_tells_nobody_the_secret() -> None:
    lead = Lead(endpoint="tcp://10.0.0.1:4", server_key=b"s" * 40, public_key=b"p" * 40, secret_key=b"x" * 40)
    assert "xxx" not in repr(lead)
    data = msgspec.msgpack.encode(lead)
    assert msgspec.msgpack.decode(data, type=Lead) == lead
    for wrong in (b"x" * 39, b""):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(
                data.replace(msgspec.msgpack.encode(b"x" * 40), msgspec.msgpack.encode(wrong)), type=Lead
            )


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_a_decode_error(noise: bytes) -> None:
    for decode in (decode_from_rank, decode_from_saver):
        with pytest.raises(msgspec.DecodeError):
            decode(noise)


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 60), st.integers(0, 255))
def test_a_changed_byte_is_another_message_or_an_error(position: int, value: int) -> None:
    payload = bytearray(encode(Staged(seq=1, slot=0, step=2, copy_s=0.5)))
    payload[position % len(payload)] = value
    with contextlib.suppress(msgspec.DecodeError):
        decode_from_rank(bytes(payload))
