"""A coverage-guided fuzzer over what a relay says to a lead: `make fuzz`, or

    python -m tests.fuzz.fuzz_link -max_total_time=600 CORPUS

An input is a conversation (`links.split`). Whatever it says, the lead raises nothing, answers only with words that can
be read, writes nothing but what the relay owns, and commits nothing that its own rank had not staged. Needs `atheris`.
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
    from async_ckpt.core.protocol import Granted, encode
    from async_ckpt.core.slots import SlotPaths
    from async_ckpt_saver import desk, hub, live, registration, run  # noqa: F401
    from async_ckpt_saver.hosts import (  # noqa: F401
        copies,
        copy_keeper,
        lane,
        link_words,
        part_answers,
        part_commit,
        reception,
        remote,
        sessions,
        spreading,
    )
    from tests.fuzz import links

# Fixed, so that the payloads of an earlier corpus still name a directory below the root.
_HOME = Path(tempfile.gettempdir()) / f"async-ckpt-fuzz-links-{os.getuid()}"


def one_input(data: bytes) -> None:
    lead = links.FuzzedLead(_HOME)
    try:
        lead.receive(links.NEAR, encode(links.half(_HOME / "run", 0)))
        for number, word, payload in links.split(data[:65_536]):
            lead.hear(b"lane-%d" % number, word, payload)
            lead.settle()
        assert not list(_HOME.glob("**/async_ckpt.json")), "a checkpoint of what rank 0 had not staged"
        granted = next((answer for answer in lead.answers if isinstance(answer, Granted)), None)
        if granted is not None and Path(granted.run).exists():
            for slot in (0, 1):
                file = (SlotPaths(Path(granted.run), slot).image / links.FILE.path).read_bytes()
                own = len(links.FILE.header) + links.HALF_BYTES
                assert file[:own] == links.FILE.header + bytes(links.HALF_BYTES), "bytes of rank 0 were written"
    finally:
        lead.close()


def seed(corpus: Path) -> None:
    """A whole life, and its beginnings."""
    corpus.mkdir(parents=True, exist_ok=True)
    frames = list(links.numbered(links.words(_HOME / "run")))
    for count in range(1, len(frames) + 1):
        (corpus / f"link-seed-{count}").write_bytes(links.joined(iter(frames[:count])))


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
