"""ZeroMQ over ipc drops messages that it said it sent, when the sender exits while the receiver is behind.

A sender process sends numbered messages, closes its context with LINGER 5 s, and exits with status 0; the receiver
reads slowly. "Stays": the sender lives on until the receiver has read all.

    python docs/decisions/measure/ipc_loss.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

import zmq

MESSAGES = 20_000
PAYLOAD_BYTES = 100
PAUSE_EVERY = 100  # the receiver rests for a millisecond after so many
SILENCE_MS = 3000  # after this nothing more comes


def send(endpoint: str) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.LINGER, 5000)
    socket.connect(endpoint)
    for number in range(MESSAGES):
        socket.send(number.to_bytes(4, "little") + bytes(PAYLOAD_BYTES))
    sys.stdin.read()  # returns at once, or, for a sender that stays, when the receiver has read all
    socket.close()
    context.term()  # returns when ZeroMQ has handed everything over, or after LINGER


def receive(endpoint: str, *, high_water_mark: int, stay: bool) -> tuple[int, int]:
    """Returns (distinct messages that arrived, the sender's exit status)."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.set(zmq.RCVHWM, high_water_mark)
    socket.bind(endpoint)
    bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    sender = subprocess.Popen(
        [sys.executable, __file__, "--send", bound], stdin=subprocess.PIPE if stay else subprocess.DEVNULL
    )
    arrived: set[bytes] = set()
    while len(arrived) < MESSAGES and socket.poll(SILENCE_MS):
        arrived.add(socket.recv_multipart()[1][:4])
        if len(arrived) % PAUSE_EVERY == 0:
            time.sleep(0.001)
    if sender.stdin is not None:
        sender.stdin.close()
    status = sender.wait(timeout=30)
    socket.close(0)
    context.term()
    return len(arrived), status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--send", metavar="ENDPOINT", help="be the sender (used by this script itself)")
    endpoint = parser.parse_args().send
    if endpoint is not None:
        send(endpoint)
        return
    print(f"libzmq {zmq.zmq_version()}, {MESSAGES} messages of {PAYLOAD_BYTES + 4} bytes")
    with tempfile.TemporaryDirectory() as folder:
        ipc = f"ipc://{folder}/socket"
        for name, where, high_water_mark, stay in (
            ("ipc, sender exits", ipc, 1000, False),
            ("ipc, sender exits, RCVHWM 0", ipc, 0, False),
            ("ipc, sender stays", ipc, 1000, True),
            ("tcp, sender exits", "tcp://127.0.0.1:*", 1000, False),
        ):
            arrived, status = receive(where, high_water_mark=high_water_mark, stay=stay)
            print(f"{name:28} arrived {arrived:5}, lost {MESSAGES - arrived:5}, exit status {status}", flush=True)


if __name__ == "__main__":
    main()
