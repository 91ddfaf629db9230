"""One saver, thousands of simulated ranks: what each costs it in time and memory.

    python -m benchmarks.scale              # 8 ... 4096 ranks, about 2 minutes on 2 cores
    python -m benchmarks.scale --ranks 64

Times of the saver are its CPU time, all threads, over the whole of what is counted: hashing and writing included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import measure

RANKS = (8, 64, 512, 1024, 4096)
TENSORS = 1120
_SAVES = 10
_SENDERS = 4
_COLUMNS = (
    ("ranks", 6), ("registered", 11), ("us a rank", 10), ("message", 10), ("save, wall", 11), ("us a rank", 10),
    ("in the loop", 12), ("private MB: connected", 22), ("registered", 11), ("after saves", 12),
)  # fmt: skip
_FILES_A_RANK = 3  # a connection, a pidfd, and some air


class Saver:
    """A daemon of its own, as `async-ckpt-saver run` starts it."""

    def __init__(self, home: Path) -> None:
        self.endpoint = f"ipc://{home}/saver.sock"
        command = [sys.executable, "-m", "async_ckpt_saver", "run", "--bind", self.endpoint, "--root", str(home)]
        self.started_s = time.perf_counter()
        self._log = (home / "saver.log").open("wb")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def cpu_s(self) -> float:
        return measure.cpu_s([self.process.pid])

    def loop_cpu_s(self) -> float:
        return measure.main_thread_cpu_s(self.process.pid)

    def memory_bytes(self) -> dict[str, int]:
        return measure.memory_bytes(self.process.pid)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        self._log.close()


class Senders:
    """Processes that play ranks; every command goes to all of them, and is done when all have answered."""

    def __init__(self, saver: Saver, home: Path, ranks: int, tensors: int) -> None:
        processes = min(_SENDERS, ranks)
        edges = [ranks * number // processes for number in range(processes + 1)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.simulated", saver.endpoint, str(home / "run"), str(ranks),
                 str(first), str(last - first), str(tensors)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for first, last in itertools.pairwise(edges)
        ]  # fmt: skip
        self._answers()

    def do(self, command: str) -> list[dict[str, Any]]:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()
        return self._answers()

    def stop(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _answers(self) -> list[dict[str, Any]]:
        found = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"a sender ended with {process.wait()}")
            found.append(json.loads(line))
        return found


def simulate(ranks: int, *, tensors: int = TENSORS, saves: int = _SAVES) -> dict[str, Any]:
    """Register `ranks` ranks, then save `saves` times. Seconds, and bytes of the saver's memory."""
    with tempfile.TemporaryDirectory(prefix="async-ckpt-scale-") as name:
        home = Path(name)
        saver = Saver(home)
        try:
            senders = Senders(saver, home, ranks, tensors)
            senders.do("hello")
            connected = saver.memory_bytes()
            cpu_s, started_s = saver.cpu_s(), time.perf_counter()
            answers = senders.do("register")
            granted_s = time.perf_counter() - started_s
            senders.do("ready")
            registered_s, registering_cpu_s = time.perf_counter() - started_s, saver.cpu_s() - cpu_s
            registered = saver.memory_bytes()
            assert sum(answer["owned"] for answer in answers) > 0
            wall_s, save_cpu_s, loop_cpu_s = [], [], []
            for step in range(saves):
                senders.do(f"stage {step}")
                cpu_s, loop_s, started_s = saver.cpu_s(), saver.loop_cpu_s(), time.perf_counter()
                senders.do(f"save {step}")
                wall_s.append(time.perf_counter() - started_s)
                save_cpu_s.append(saver.cpu_s() - cpu_s)
                loop_cpu_s.append(saver.loop_cpu_s() - loop_s)
            saved = saver.memory_bytes()
            senders.do("bye")
            senders.stop()
        finally:
            saver.stop()
    return {
        "ranks": ranks,
        "tensors": tensors,
        "granted_s": granted_s,
        "registered_s": registered_s,
        "registering_cpu_s": registering_cpu_s,
        "sent_bytes": sum(answer["sent_bytes"] for answer in answers),
        "save_s": statistics.median(wall_s),
        "save_cpu_s": statistics.median(save_cpu_s),
        "save_loop_cpu_s": statistics.median(loop_cpu_s),
        "connected_uss": connected["uss"],
        "registered_uss": registered["uss"],
        "saved_uss": saved["uss"],
    }


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    lines = [" ".join(f"{name:>{width}}" for name, width in _COLUMNS)]
    for row in found:
        ranks = row["ranks"]
        lines.append(
            f"{ranks:>6} {row['registered_s']:>9.2f} s {row['registering_cpu_s'] / ranks * 1e6:>10.0f} "
            f"{row['sent_bytes'] / ranks / 1e3:>7.1f} kB {row['save_s'] * 1e3:>8.1f} ms "
            f"{row['save_cpu_s'] / ranks * 1e6:>10.1f} {row['save_loop_cpu_s'] / ranks * 1e6:>12.1f} "
            f"{row['connected_uss'] / 1e6:>22.1f} "
            f"{row['registered_uss'] / 1e6:>11.1f} {row['saved_uss'] / 1e6:>12.1f}"
        )
    return lines


def raise_file_limit(ranks: int) -> None:
    """Sockets are files. Inherited by the saver and the senders."""
    wanted = 256 + _FILES_A_RANK * ranks
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=list(RANKS))
    parser.add_argument("--tensors", type=int, default=TENSORS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    raise_file_limit(max(arguments.ranks))
    found = []
    for ranks in arguments.ranks:
        found.append(simulate(ranks, tensors=arguments.tensors))
        print(table(found)[-1] if len(found) > 1 else "\n".join(table(found)), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": measure.machine(), "cpus": os.cpu_count(), "rows": found}))


if __name__ == "__main__":
    main()
