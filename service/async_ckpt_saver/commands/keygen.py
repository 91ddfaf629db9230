"""`keygen`: a pair of CURVE keys, for a saver on tcp or for one of its clients."""

from __future__ import annotations

import argparse

from .. import exit_codes

HELP = "make a pair of CURVE keys for tcp; nothing is overwritten"
EXAMPLE = """\
async-ckpt-saver keygen /etc/async-ckpt/saver
  makes saver.key, which may be seen, and saver.key_secret (mode 0600), which may not"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="PATH.key and PATH.key_secret are made")


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from async_ckpt.core.keys import generate

    for path in generate(Path(options.path)):
        print(path)
    return exit_codes.OK
