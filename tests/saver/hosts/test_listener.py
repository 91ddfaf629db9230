"""A lead's door, with a relay's socket: who sends pieces hears between any two of them what has come."""

from __future__ import annotations

import asyncio
import itertools

import zmq

from async_ckpt_saver.hosts.link_words import Beat, encode_word, in_frames
from async_ckpt_saver.hosts.listener import KeyRing, Listener
from async_ckpt_saver.rejections import Rejections

PIECES = 4


def test_a_turn_ends_behind_each_piece_however_many_wait() -> None:
    events: list[str] = []
    pieces: list[bytes] = []

    async def listen() -> None:
        done = asyncio.Event()

        def on_frames(routing: bytes, word: bytes | memoryview, payload: object) -> None:
            assert isinstance(payload, list)
            events.append("piece")
            pieces.append(b"".join(payload))
            if len(pieces) < PIECES:
                assert listener._socket.poll(20_000), "the next piece never came"
            else:
                done.set()

        listener = Listener(asyncio.get_running_loop(), Rejections(), on_frames, lambda: events.append("turn"))
        endpoint = listener.open("127.0.0.1:0", None, KeyRing(set()))
        context = zmq.Context(1)
        dealer = context.socket(zmq.DEALER)
        dealer.connect(endpoint)
        for number in range(PIECES):
            dealer.send_multipart([encode_word(Beat(sent=0, received=0)), *in_frames(bytes([number]) * 3_000_000)])
        try:
            await asyncio.wait_for(done.wait(), 30)
        finally:
            context.destroy(0)
            listener.close()

    asyncio.run(listen())
    assert pieces == [bytes([number]) * 3_000_000 for number in range(PIECES)]
    assert ("piece", "piece") not in itertools.pairwise(events)
