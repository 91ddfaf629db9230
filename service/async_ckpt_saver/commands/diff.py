"""`diff`: how two checkpoints differ."""

from __future__ import annotations

import argparse

from .. import exit_codes
from .output import progress

HELP = "compare two checkpoints: tensors, settings, metrics"
EXAMPLE = "async-ckpt-saver diff /data/runs/llama3/checkpoint-100 /data/runs/llama3/checkpoint-200"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a checkpoint, or a directory, for its newest")
    parser.add_argument("b", metavar="B", help="the other")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(options: argparse.Namespace) -> int:
    import msgspec

    from ..comparison import bytes_to_read, compare
    from .paths import one_checkpoint

    a, b = one_checkpoint(options.a), one_checkpoint(options.b)
    with progress("diff", bytes_to_read(a, b)) as advance:
        found = compare(a, b, advance)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        for mark, names in (("-", found.removed), ("+", found.added)):
            for name in names:
                print(f"{mark} tensor {name}")
        for reshaped in found.reshaped:
            print(f"! tensor {reshaped.name}: {reshaped.before} -> {reshaped.after}")
        for changed in found.changed:
            by = "" if changed.max_abs is None else f", by at most {changed.max_abs:.6g}"
            print(f"~ tensor {changed.name}: {changed.bytes} bytes{by}")
        for value in found.values:
            print(f"~ {value.name}: {value.before} -> {value.after}")
        print(f"{found.equal} tensors equal, {len(found.changed)} different, {len(found.reshaped)} of another shape "
              f"or dtype, {len(found.removed)} only in A, {len(found.added)} only in B")  # fmt: skip
    return exit_codes.FOUND if found.differs else exit_codes.OK
