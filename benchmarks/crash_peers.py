"""What is left after a SIGKILL, with async_ckpt and with what users would pick instead: the same model, the same kills.

    python -m benchmarks.crash_peers --trials 10 --seed 1

Two FSDP2 ranks save in every step, each peer called as its own documentation says. Every trained value equals the
number of its step while it is saved, and another number once the peer allows it. Somebody is killed; when nobody works
on the directory any more, two new ranks load every checkpoint in it by the peer's own means, and look at all values.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.util
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.crash_ways import PEERS
from tests.ranks import RanksError
from tests.system.crash_checks import note, open_notes
from tests.system.processes import Job, home, remove_home, savers, until

WORLD = 2
STEPS = 12
KILL_AT = 4
_SETTLE_S = 40.0  # how long what the dead have started may take


# --- what ranks do -------------------------------------------------------------------------------------------------


def train(folder: str, peer_name: str) -> None:
    import torch

    from tests.system.training import rank, reached

    model, peer, directory = _setup(folder, peer_name)
    staged, committed = (open_notes(folder, what, rank()) for what in ("staged", "committed"))
    for step in range(1, STEPS + 1):
        _fill(model, float(step))
        peer.save(directory / f"checkpoint-{step}", step)
        peer.staged()
        note(staged, step)
        _fill(model, step + 0.5)
        if step == KILL_AT - 1:
            reached(folder, "killing")
        try:
            peer.committed()
        except Exception as error:  # training goes on, as a careful loop does
            print(f"step {step}: {error!r}", flush=True)
        else:
            note(committed, step)
        torch.distributed.barrier()
    peer.close()


def judge(folder: str, peer_name: str) -> None:
    """Write, for each directory with a final name, whether this rank could load it and found its step in all values."""
    from tests.system.training import rank, trained

    model, peer, directory = _setup(folder, peer_name)
    verdicts = {}
    for path in sorted(directory.glob("checkpoint-*")):
        _fill(model, -1.0)
        step = float(path.name.removeprefix("checkpoint-"))
        try:
            peer.load(path)
        except BaseException as error:
            print(f"{path}: {error!r}", flush=True)
            verdicts[path.name] = "not loadable"
        else:
            whole = all(bool((p._local_tensor == step).all()) for p in trained(model))  # type: ignore[attr-defined]
            verdicts[path.name] = "right" if whole else "wrong"
    peer.close()
    Path(folder, f"verdicts-{rank()}").write_text(json.dumps(verdicts))


def _setup(folder: str, peer_name: str) -> tuple[Any, Any, Path]:
    from tests.system.crash import make_model

    # Peers start helpers of their own, which multiprocessing forbids in a child that it would end at exit.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    directory = Path(folder, "runs")
    directory.mkdir(exist_ok=True)
    model = make_model()
    return model, PEERS[peer_name](model, directory), directory


def _fill(model: Any, value: float) -> None:
    import torch

    from tests.system.training import trained

    with torch.no_grad():
        for parameter in trained(model):
            parameter._local_tensor.fill_(value)  # type: ignore[attr-defined]


# --- kills ---------------------------------------------------------------------------------------------------------


def all_ranks_once_staged(job: Job, folder: Path, chance: random.Random) -> None:
    until(lambda: all(KILL_AT in _own(folder, "staged", rank) for rank in range(WORLD)), "staged on all ranks", 60)
    job.kill()


def all_ranks_at_random(job: Job, folder: Path, chance: random.Random) -> None:
    time.sleep(chance.uniform(0, 0.5))  # the moment is what is drawn
    job.kill()


def one_rank_at_random(job: Job, folder: Path, chance: random.Random) -> None:
    time.sleep(chance.uniform(0, 0.5))
    job.kill(chance.randrange(WORLD))
    with contextlib.suppress(AssertionError):
        until(lambda: None not in job.statuses, "the other rank ends", 40)


def the_writer_at_random(job: Job, folder: Path, chance: random.Random) -> None:
    """The process that writes, where there is one besides the ranks: training should reach its end."""
    time.sleep(chance.uniform(0, 0.5))
    helpers = [pid for rank in job.pids for pid in _children(rank) if b"spawn_main" in _command(pid)]
    for pid in [*helpers, *savers(folder)][:1]:
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(AssertionError):
        until(lambda: None not in job.statuses, "training ends", 60)


Kill = Callable[[Job, Path, random.Random], None]
KILLS: list[Kill] = [
    all_ranks_once_staged, all_ranks_at_random, one_rank_at_random, the_writer_at_random,
]  # fmt: skip


def trial(peer: str, kill: Kill, folder: Path, chance: random.Random) -> Counter[str]:
    folder.mkdir()
    with Job("benchmarks.crash_peers:train", WORLD, folder, peer) as job:
        job.reach("killing", 150)
        kill(job, folder, chance)
        reached_the_end = job.statuses == [0] * WORLD
    left = [] if reached_the_end else _still_working(folder)
    _end(folder)
    on_all, acknowledged = (
        set.intersection(*(_own(folder, what, rank) for rank in range(WORLD))) for what in ("staged", "committed")
    )
    with Job("benchmarks.crash_peers:judge", WORLD, folder, peer) as job:
        job.wait(90)
    _end(folder)
    verdicts = [json.loads((folder / f"verdicts-{rank}").read_text()) for rank in range(WORLD)]
    seen = {name: {verdict[name] for verdict in verdicts} for name in verdicts[0]}
    right = {int(name.removeprefix("checkpoint-")) for name, found in seen.items() if found == {"right"}}
    return Counter({
        "trials": 1,
        "acknowledged, lost": len(acknowledged - right) > 0,
        "staged by all, lost": max(on_all) not in right,
        "partial under its name": any("not loadable" in found for found in seen.values()),
        "wrong values": any("wrong" in found for found in seen.values()),
        "training ended well": reached_the_end,
        "processes left": len(left) > 0,
    })  # fmt: skip


def _still_working(folder: Path) -> list[int]:
    """Who is left when everybody has had the time to finish what the dead had begun."""
    deadline_s = time.monotonic() + _SETTLE_S
    while (left := _working_below(folder)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return left


def _end(folder: Path) -> None:
    """Savers end by themselves; the helpers of ranks that end as tests do, without a teardown, do not."""
    until(lambda: not savers(folder), "the saver has ended", 60)
    for pid in _working_below(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _own(folder: Path, what: str, rank: int) -> set[int]:
    path = folder / f"{what}-{rank}"
    return {int(line) for line in path.read_text().split()} if path.exists() else set()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(each) for each in path.read_text().split()]
    return found


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _working_below(folder: Path) -> list[int]:
    """Savers, and helpers that inherited a rank's output: it lies in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "fd" / "1").startswith(str(folder)):
                found.append(int(process.name))
    return sorted({*found, *savers(folder)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=10, help="of each kill, for each peer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="default: all")
    parser.add_argument("--at-once", type=int, default=3)
    options = parser.parse_args()
    wanted = [(peer, kill, n) for peer in options.peer or PEERS for kill in KILLS for n in range(options.trials)]
    counts: dict[tuple[str, str], Counter[str]] = {(peer, kill.__name__): Counter() for peer, kill, _ in wanted}

    def run(number: int) -> None:
        peer, kill, n = wanted[number]
        folder, chance = home() / f"p{number:05}", random.Random(f"{options.seed} {kill.__name__} {n}")
        try:
            counts[peer, kill.__name__] += trial(peer, kill, folder, chance)
        except (AssertionError, RanksError) as error:
            print(f"{peer}, {kill.__name__}: no result: {error}", flush=True)
            counts[peer, kill.__name__]["no result"] += 1
        shutil.rmtree(folder, ignore_errors=True)

    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(run, range(len(wanted))))
    columns = ["trials", "acknowledged, lost", "staged by all, lost", "partial under its name", "wrong values",
               "training ended well", "processes left", "no result"]  # fmt: skip
    print(f"| peer | killed | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for (peer, kill), count in counts.items():
        print(f"| {peer} | {kill.replace('_', ' ')} | {' | '.join(str(count[column]) for column in columns)} |")
    multiprocessing.util.Finalize(None, remove_home, exitpriority=-200)


if __name__ == "__main__":
    main()
