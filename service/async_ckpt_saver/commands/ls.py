"""`ls`: the checkpoints of a training directory."""

from __future__ import annotations

import argparse

from .. import exit_codes
from .keeping import add_policy, policy_of
from .output import age, size, table

HELP = "list the checkpoints of a training directory"
EXAMPLE = "async-ckpt-saver ls /data/runs/llama3 --keep-last 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR|URL", help="the directory that attach was given")
    parser.add_argument("--json", action="store_true", help="a list of checkpoints, ages in seconds, sizes in bytes")
    add_policy(parser)


def run(options: argparse.Namespace) -> int:
    import msgspec

    from async_ckpt.core.location import location_of

    from ..inspection import listing
    from ..status import wall_clock_s

    found = listing(location_of(options.directory), policy_of(options), wall_clock_s())
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return exit_codes.OK
    rows = [
        (
            each.step,
            age(each.age_s),
            size(each.bytes),
            "latest" if each.latest else "",
            ", ".join(each.kept_by) or "would go",
            "  ".join(f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
                      for name, value in each.metrics.items()),
        )
        for each in found
    ]  # fmt: skip
    print(table((">step", ">age", ">size", "link", "kept by", "metrics"), rows))
    return exit_codes.OK
