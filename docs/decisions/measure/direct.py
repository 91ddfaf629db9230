"""Two savers on this machine, each with a /dev/shm of its own, commit what one rank on each has staged, on one disk:
the relay hands over what its rank holds, or writes it itself (--shared-fs direct). All ways take turns.

    PYTHONPATH=.:service python docs/decisions/measure/direct.py [--mib 192] [--rounds 7]     # as root, for namespaces

"link" is what went from the relay to the lead; "commit" the time from the ranks' words to the outcome, as rank 0 hears
it; "CPU" that of both savers for one commit. The first round of each way is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import tempfile
import time
from pathlib import Path

from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.protocol import ImageFile, Layout, Settled
from tests.saver.hosts import two_hosts
from tests.saver.hosts.two_hosts import Host, Job, hosts


def cpu_s(made: list[Host]) -> float:
    fields = [Path(f"/proc/{host.saver.process.pid}/stat").read_text().rpartition(")")[2].split() for host in made]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def one(job: Job, made: list[Host], step: int) -> tuple[int, float, float]:
    for rank in job.ranks:
        rank.stage(step, step % 2, say=False)
    before_bytes, before_cpu_s = job.wire.passed_bytes, cpu_s(made)
    started_s = time.perf_counter()
    for rank in job.ranks:
        rank.say_staged(step, step % 2)
    settled = job.ranks[0].peer.hear(Settled, timeout_s=300.0)
    took_s = time.perf_counter() - started_s
    assert (settled.step, settled.outcome) == (step, "committed"), settled
    return job.wire.passed_bytes - before_bytes, took_s, cpu_s(made) - before_cpu_s


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    two_hosts.ROWS = options.mib * (1 << 20) // (2 * two_hosts.COLUMNS * 4)
    specs = [TensorSpec(name, "F32", (two_hosts.ROWS, two_hosts.COLUMNS)) for name in ("a", "b")]
    two_hosts.FILE = file = plan_file("adapter_model.safetensors", specs)
    two_hosts.LAYOUT = Layout((ImageFile(file.path, file.header, file.total_bytes),), {"README.md": b"read me"})
    two_hosts.content = functools.lru_cache(1)(two_hosts.content)  # type: ignore[assignment]  # it takes longer than a commit
    with contextlib.ExitStack() as stack:
        ways = {}
        for way, direct in (("relay, CURVE", ""), ("relay, plain", ""), ("direct", "ab")):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ackpt-")))
            made = stack.enter_context(hosts(folder, folder / "root", direct=direct))
            job = Job(made, folder / "root/run", plain=way.endswith("plain")).start()
            stack.callback(job.close)
            ways[way] = job, made
        print("load before:", os.getloadavg())
        found: dict[str, list[tuple[int, float, float]]] = {way: [] for way in ways}
        for step in range(1, options.rounds + 2):
            for way, (job, made) in ways.items():
                found[way].append(one(job, made, step))
                for path in (job.directory / f"checkpoint-{step}").rglob("*.safetensors"):
                    path.unlink()  # the disk is not ours alone
        print("load after:", os.getloadavg())
        for way, each in found.items():
            links, times, cpus = zip(*each[1:], strict=True)
            link_mb, cpu_ms = statistics.median(links) / 1e6, statistics.median(cpus) * 1e3
            shown = [round(seconds * 1e3) for seconds in (statistics.median(times), min(times), max(times))]
            print(
                f"{way:14} link {link_mb:8.2f} MB   commit {shown[0]} ms ({shown[1]}-{shown[2]})   CPU {cpu_ms:.0f} ms"
            )


if __name__ == "__main__":
    main()
