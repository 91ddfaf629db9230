"""`config`: what `run` would do, without doing it."""

from __future__ import annotations

import argparse
import json

from .. import exit_codes
from . import run as run_command
from .options import add_file, add_settings, effective

HELP = "show the settings that `run` would use, and where each was given"
EXAMPLE = "async-ckpt-saver config --config /etc/async-ckpt.toml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    add_settings(parser, run_command.GROUPS)
    parser.add_argument("--json", action="store_true", help="one JSON object: {name: {value, source, where}}")


def run(options: argparse.Namespace) -> int:
    values = effective(options, run_command.SETTINGS)
    if options.json:
        print(json.dumps({name: value._asdict() for name, value in values.items()}, indent=2))
        return exit_codes.OK
    for name, value in values.items():
        shown = "(not set)" if value.value in (None, "") else value.value
        print(f"{name:<16}{shown!s:<48}{value.source}{f' {value.where}' if value.where else ''}")
    return exit_codes.OK
