"""`show`: what is in one checkpoint."""

from __future__ import annotations

import argparse
import json

from .. import exit_codes
from .output import age, size, table

HELP = "show what is in a checkpoint"
EXAMPLE = "async-ckpt-saver show /data/runs/llama3/checkpoint-200"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT|DIR", help="a checkpoint, or a directory, for its newest")
    parser.add_argument("--tensors", action="store_true", help="list every tensor: name, dtype, shape, bytes")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")


def run(options: argparse.Namespace) -> int:
    import msgspec

    from ..inspection import Shown, inspect
    from ..status import wall_clock_s
    from .paths import one_checkpoint

    found = inspect(one_checkpoint(options.checkpoint))
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return exit_codes.OK

    def section(title: str, content: object) -> None:
        if content:
            print(f"{title}:\n" + "\n".join(f"  {line}" for line in json.dumps(content, indent=2).splitlines()[1:-1]))

    def files(shown: Shown) -> str:
        rows = [
            (
                each.path,
                size(each.bytes),
                f"{each.tensors} tensors" if each.tensors is not None else "",
                ", ".join(f"{count}x{dtype}" for dtype, count in (each.dtypes or {}).items()),
            )
            for each in shown.files
        ]
        return table(("file", ">size", ">holds", "dtypes"), rows)

    print(f"step {found.step}, {age(wall_clock_s() - found.created_unix_s)} old, {size(found.bytes)}, "
          f"written by {found.world} rank{'s' if found.world > 1 else ''}")  # fmt: skip
    print(files(found))
    if options.tensors:
        rows = [(each.name, each.dtype, list(each.shape), each.bytes) for each in found.tensors]
        print(table(("tensor", "dtype", "shape", ">bytes"), rows))
    section("metrics", found.metrics)
    section("extra", found.extra if isinstance(found.extra, dict | list) else {"": found.extra} if found.extra else {})
    section("adapter", {name: value for name, value in (found.adapter or {}).items() if value not in (None, {}, [])})
    section("training state", found.training_state)
    section("versions", found.versions)
    return exit_codes.OK
