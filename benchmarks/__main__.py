"""Measure every way of saving in one run, and judge the result: `make bench`.

python -m benchmarks                 # all shapes, about 10 minutes on 2 cores
python -m benchmarks --quick         # small tensors, one minute: does everything still run?
python -m benchmarks --only 560      # one shape
python -m benchmarks.report          # table, verdicts and picture again, from benchmarks/results/
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import measure, scale
from .catalogue import shapes
from .report import RESULTS, write
from .saver import saver_section

_SCALES = (8, 4096)


def run_shape(name: str, world: int, root: Path, *, quick: bool) -> dict[str, Any]:
    """One job of `world` ranks. Raises CalledProcessError if it fails; its output is shown."""
    out = root / f"{name}.json"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={world}", "-m", "benchmarks.rank", "--shape", name,
               "--folder", str(root / name), "--out", str(out), *(["--quick"] if quick else [])]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error",
                   "HF_HUB_OFFLINE": "1"}  # fmt: skip
    with (root / f"{name}.log").open("w+") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            log.seek(0)
            sys.stderr.write(log.read())
    done.check_returncode()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _compile() -> None:
    """As pip does when it installs a package: the peers are installed, and we may run from a source tree."""
    for package in ("async_ckpt", "async_ckpt_saver"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            compileall.compile_dir(folder, quiet=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", help="these shapes only; no goals are judged then")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the filesystem to be measured")
    parser.add_argument("--results", type=Path, default=None, help=f"default: {RESULTS}; a temporary one if --quick")
    arguments = parser.parse_args()
    chosen = {name: shape for name, shape in shapes(quick=arguments.quick).items()
              if not arguments.only or name in arguments.only}  # fmt: skip
    scale.raise_file_limit(_SCALES[-1])
    _compile()
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=arguments.folder) as name:
        root = Path(name)
        run: dict[str, Any] = {
            "machine": measure.machine(),
            "filesystem": measure.filesystem(root),
            "quick": arguments.quick,
            "shapes": {},
        }
        for shape in chosen.values():
            print(f"{time.perf_counter() - started_s:4.0f} s  {shape.title}, {shape.world} ranks", flush=True)
            found = run_shape(shape.name, shape.world, root, quick=arguments.quick)
            run["shapes"][shape.name] = {"title": shape.title, "world": shape.world, **found}
        print(f"{time.perf_counter() - started_s:4.0f} s  the saver by itself", flush=True)
        run["saver"] = saver_section(quick=arguments.quick)
        tensors = 28 if arguments.quick else scale.TENSORS
        run["scale"] = [scale.simulate(ranks, tensors=tensors) for ranks in ((8,) if arguments.quick else _SCALES)]
    run["seconds"] = time.perf_counter() - started_s
    if arguments.results is None and arguments.quick:
        with tempfile.TemporaryDirectory() as results:
            print(write(run, Path(results)))
    else:
        print(write(run, arguments.results or RESULTS))


if __name__ == "__main__":
    main()
