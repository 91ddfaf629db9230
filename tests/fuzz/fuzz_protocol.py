"""A coverage-guided fuzzer over the decoder and the hub: `make fuzz`, or

    python -m tests.fuzz.fuzz_protocol -max_total_time=600 CORPUS

An input is a conversation (`messages.split`). Whatever it says, the hub raises nothing, answers only with messages that
can be encoded, and leaves no checkpoint that no rank had staged. libFuzzer's options apply. Needs `atheris`.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["async_ckpt", "async_ckpt_saver"]):
    from async_ckpt.core import layout, protocol  # noqa: F401
    from async_ckpt_saver import desk, hub, live, registration, run  # noqa: F401
    from tests.fuzz import messages

# Fixed, so that the payloads of an earlier corpus still name a directory below the root.
_HOME = Path(tempfile.gettempdir()) / f"async-ckpt-fuzz-{os.getuid()}"


def one_input(data: bytes) -> None:
    saver = messages.FuzzedSaver(_HOME)
    try:
        for peer, payload in messages.split(data[:65_536]):
            saver.receive(b"peer-%d" % peer, payload)
            saver.settle()
        assert not list(_HOME.glob("**/async_ckpt.json")), "a checkpoint of what nobody had staged"
    finally:
        saver.close()


def seed(corpus: Path) -> None:
    """Real messages, one by one and as conversations."""
    corpus.mkdir(parents=True, exist_ok=True)
    payloads = [protocol.encode(message) for message in messages.real_messages(_HOME / "run")]
    conversations = [[payload] for payload in payloads] + [payloads[:2], payloads[:8], payloads[10:], payloads]
    for number, conversation in enumerate(conversations):
        content = messages.joined((peer % 2, payload) for peer, payload in enumerate(conversation))
        (corpus / f"seed-{number}").write_bytes(content)
    (corpus / "seed-alone").write_bytes(messages.joined((0, payload) for payload in payloads))


def main() -> None:
    logging.disable(logging.CRITICAL)
    _HOME.mkdir(mode=0o700, exist_ok=True)
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):
            seed(Path(argument))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
