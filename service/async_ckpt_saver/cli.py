"""The command line: finds the verb, builds its parser alone, turns what it raises into an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable

from async_ckpt.core.errors import CheckpointError

from . import exit_codes
from .commands import GROUPS, VERBS, load
from .settings import SettingsError

PROGRAM = "async-ckpt-saver"


def main(arguments: list[str] | None = None) -> int:
    """The exit status, one of `exit_codes`. Raises SystemExit for --help and on wrong usage."""
    words = sys.argv[1:] if arguments is None else arguments
    asked = words[:1] if words and words[0] in VERBS else VERBS
    options = build_parser(asked).parse_args(words)
    try:
        status: int = options.command.run(options)
        sys.stdout.flush()
        return status
    except SettingsError as error:
        print(f"{PROGRAM} {words[0]}: {error}", file=sys.stderr)
        return exit_codes.USAGE
    except BrokenPipeError:
        # Whoever read our output has seen enough, as in `ls DIR | head`. The interpreter flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.OK
    except (CheckpointError, OSError) as error:
        print(f"{PROGRAM} {words[0]}: {error}", file=sys.stderr)
        return exit_codes.ERROR


class _WithoutVerbs(argparse.RawDescriptionHelpFormatter):
    """argparse would list them once more, in one heap. Hiding them from it hides them from completion as well."""

    def add_argument(self, action: argparse.Action) -> None:
        if action.dest != "verb":
            super().add_argument(action)


def build_parser(verbs: Iterable[str]) -> argparse.ArgumentParser:
    """A parser that knows `verbs`. Its answer has `command`, the module of the verb."""
    verbs = tuple(verbs)
    commands = {verb: load(verb) for verb in verbs}
    listing = [
        "\n".join([f"{title}:", *(f"  {verb:<12}{commands[verb].HELP}" for verb in group if verb in commands)])
        for title, group in GROUPS.items()
        if not set(group).isdisjoint(commands)
    ]
    codes = "\n".join(f"  {code}  {meaning}" for code, meaning in exit_codes.EXPLAINED.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} VERB [options]",
        description="\n\n".join(["Commits the checkpoints that training ranks stage in shared memory.", *listing]),
        epilog=f"{PROGRAM} VERB --help shows the options of a verb, and an example.\n\nexit status:\n{codes}",
        formatter_class=_WithoutVerbs,
    )
    choices = parser.add_subparsers(dest="verb", required=True, metavar="VERB", prog=PROGRAM)
    for verb, command in commands.items():
        each = choices.add_parser(
            verb,
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(each)
        each.set_defaults(command=command)
    return parser
