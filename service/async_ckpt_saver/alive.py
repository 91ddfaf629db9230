"""`python -m async_ckpt_saver.alive ENDPOINT`: does the saver there answer? For health checks of containers."""

from __future__ import annotations

import sys

import zmq

from async_ckpt.core.protocol import Ping, Pong, decode_from_saver, encode

ANSWER_S = 3.0


def answers(endpoint: str, timeout_s: float = ANSWER_S) -> bool:
    """Whether the saver's loop has answered a ping of ours within `timeout_s`: a saver that hangs holds its socket all
    the same. Changes nothing in the saver."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.connect(endpoint)
        socket.send(encode(Ping(unsettled=[])))
        return bool(socket.poll(int(timeout_s * 1000))) and isinstance(decode_from_saver(socket.recv()), Pong)


def main(arguments: list[str]) -> int:
    """Exit codes: 0 it answers, 1 it does not, 2 wrong usage."""
    if len(arguments) != 1:
        print("usage: python -m async_ckpt_saver.alive ENDPOINT", file=sys.stderr)
        return 2
    (endpoint,) = arguments
    if answers(endpoint):
        return 0
    print(f"no saver answers at {endpoint} within {ANSWER_S:g} s", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
