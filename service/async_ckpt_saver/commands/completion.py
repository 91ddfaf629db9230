"""`completion`: a script that makes a shell complete this program's verbs and flags."""

from __future__ import annotations

import argparse
import sys

from async_ckpt.core.errors import CheckpointError

from .. import exit_codes

HELP = "print a completion script for bash, zsh or tcsh"
EXAMPLE = 'eval "$(async-ckpt-saver completion bash)"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="for which shell")


def run(options: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise CheckpointError("completion needs shtab: pip install 'async-ckpt[cli]'") from error

    from ..cli import build_parser
    from . import VERBS

    sys.stdout.write(shtab.complete(build_parser(VERBS), options.shell))
    return exit_codes.OK
