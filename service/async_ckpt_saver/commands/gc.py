"""`gc`: remove what crashes left, and what is to be kept no longer."""

from __future__ import annotations

import argparse

from .. import exit_codes
from .keeping import add_policy, policy_of
from .output import size

HELP = "remove what crashes left, and checkpoints that no rule keeps"
EXAMPLE = "async-ckpt-saver gc /data/runs/llama3 --keep-last 3 --keep-best eval_loss:min:2 --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR|URL", help="a training directory; a saver may be at work in it")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    parser.add_argument("--json", action="store_true", help="a list of {name, bytes, kind, done, reason}")
    add_policy(parser)


def run(options: argparse.Namespace) -> int:
    import msgspec

    from async_ckpt.core.location import location_of

    from ..collection import LEFT_ALONE, Removal, collect

    def tell(removal: Removal) -> None:
        if not options.json:
            went = "removed" if removal.done else f"stays: {removal.reason}" if removal.reason else (
                "would go" if options.dry_run else "could not be removed")  # fmt: skip
            print(f"{removal.kind:<11} {removal.name}  {size(removal.bytes)}  {went}", flush=True)

    removals = collect(location_of(options.directory), policy_of(options), dry_run=options.dry_run, progress=tell)
    gone = [each for each in removals if each.done or (options.dry_run and not each.reason)]
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(removals), indent=2).decode())
    else:
        total = size(sum(each.bytes for each in gone))
        print(f"{len(gone)} {'would be removed' if options.dry_run else 'removed'}, {total}")
    failed = not options.dry_run and any(not each.done and each.reason not in LEFT_ALONE for each in removals)
    return exit_codes.ERROR if failed else exit_codes.OK
