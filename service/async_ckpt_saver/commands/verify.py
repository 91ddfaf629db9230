"""`verify`: is what lies on the disk what was committed?"""

from __future__ import annotations

import argparse

from .. import exit_codes
from .output import progress, size
from .paths import checkpoint_directories

HELP = "compare checkpoints with their hashes, headers and settings"
EXAMPLE = "async-ckpt-saver verify /data/runs/llama3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="DIR|CKPT",
        help="a training directory or its URL (all its checkpoints), or one checkpoint",
    )
    parser.add_argument("--json", action="store_true", help="a list of reports, with every damaged byte range")


def run(options: argparse.Namespace) -> int:
    import msgspec

    from async_ckpt.core.errors import CheckpointError

    from ..verification import planned_bytes, verify

    checkpoints = [checkpoint for path in options.paths for checkpoint in checkpoint_directories(path)]
    total_bytes = sum(planned_bytes(checkpoint) for checkpoint in checkpoints)
    reports = []
    with progress("verify", total_bytes) as advance:
        for checkpoint in checkpoints:
            try:
                report = verify(checkpoint, advance)
            except CheckpointError:
                if checkpoint.exists() or str(checkpoint) in options.paths:
                    raise
                continue  # retention has removed it since the list was made
            reports.append(report)
            if options.json:
                continue
            state = "DAMAGED" if report.damage else "ok"
            print(f"{state:<8} {checkpoint}  {report.files} files  {size(report.bytes)}", flush=True)
            for damage in report.damage:
                print(f"         {damage}")
            for name in report.unlisted:
                print(f"         {name}: not in the manifest, so nothing is known of it")
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(reports), indent=2).decode())
    return exit_codes.DAMAGE if any(report.damage for report in reports) else exit_codes.OK
