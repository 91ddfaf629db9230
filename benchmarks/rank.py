"""One rank of a benchmark job. Started by `__main__`.

The peers' helper processes import this module again, as `multiprocessing` does with a program's main one. So it imports
nothing that they do not need: their start and their memory are not to suffer from what only we need.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ways", type=lambda text: tuple(text.split(",")), help="only these")
    arguments = parser.parse_args()
    from .job import run

    run(arguments.shape, arguments.ways, arguments.folder, arguments.out, quick=arguments.quick)


if __name__ == "__main__":
    main()
