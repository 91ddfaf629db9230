"""The demo: train, kill every rank behind a save, find the checkpoint committed, go on from RAM, use the adapter.

    make demo        # or: python examples/demo.py

Ends with an error if any claim it makes does not hold in this very run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from prepare_model import prepare

import async_ckpt

HERE = Path(__file__).resolve().parent
DIRECTORY = HERE.parent / "runs" / "demo"
LOG = DIRECTORY.with_suffix(".log")
SHM = Path(f"/dev/shm/async-ckpt-{os.getuid()}")
RANKS = 2
KILL_STEP = 8
MARK = "@demo "  # as in demo_rank.py, which cannot be imported without torch
COMMIT_LIMIT_S = 30.0
END_LIMIT_S = 30.0
ENVIRONMENT = {
    "DEMO_KILL_STEP": str(KILL_STEP),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "",  # else print() writes a line in two pieces, and another rank's may come between
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarted ranks may meet in a store with stale addresses
    "TRANSFORMERS_VERBOSITY": "error",
}


class ClaimFailed(Exception):
    pass


def require(holds: bool, claim: str) -> None:
    if not holds:
        raise ClaimFailed(claim)


def heading(text: str) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}{text}{plain}", flush=True)


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


class Story:
    """What happens in the training, as its ranks tell it."""

    def __init__(self) -> None:
        self.pids: dict[int, int] = {}
        self.losses: dict[int, float] = {}
        self.stalls_s: dict[int, list[float]] = defaultdict(list)
        self.gathered: dict[str, dict[str, Any]] = {}
        self.resumed: list[dict[str, Any]] = []
        self.killed_s: float | None = None

    def hear(self, event: dict[str, Any]) -> None:
        name, rank = event["event"], event["rank"]
        if name == "started":
            self.pids[rank] = event["pid"]
        elif name == "attached" and rank == 0 and self.killed_s is not None:
            say(f"torchrun has started them again; attached {time.monotonic() - self.killed_s:.1f} s after the kill")
        elif name == "resumed":
            self._resume(event)
        elif name == "saved" and rank == 0:
            self.losses[event["step"]] = event["loss"]
        elif name == "staged" and event["step"] == KILL_STEP and self.killed_s is None:
            self._kill()
        elif name == "stalls":
            self.stalls_s[rank] = event["stalls_s"]
        elif name == "gathered":
            self.gathered[event["way"]] = event

    def _kill(self) -> None:
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
        self.killed_s = time.monotonic()
        newest = async_ckpt.latest(DIRECTORY)
        say(f"step {KILL_STEP:3}  loss {self.losses[KILL_STEP]:6.3f}  staged. SIGKILL to all ranks, pids "
            f"{' and '.join(map(str, self.pids.values()))}; {committed_so_far(newest)}")  # fmt: skip
        heading("2. The saver commits it all the same")
        self._await_commit()

    def _await_commit(self) -> None:
        assert self.killed_s is not None
        checkpoint = async_ckpt.latest(DIRECTORY)
        while checkpoint is None or checkpoint.name != f"checkpoint-{KILL_STEP}":
            require(
                time.monotonic() - self.killed_s < 30, f"step {KILL_STEP} was not committed within 30 s of the kill"
            )
            time.sleep(0.0005)
            checkpoint = async_ckpt.latest(DIRECTORY)
        after = ms(time.monotonic() - self.killed_s)
        say(f"{os.path.relpath(checkpoint, HERE.parent)} is there, {after} after the kill:")
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            say(f"  {path.relative_to(checkpoint)!s:40} {path.stat().st_size:>12,} bytes")
        heading("3. The ranks come back and go on from RAM")

    def _resume(self, event: dict[str, Any]) -> None:
        self.resumed.append(event)
        require(event["step"] == KILL_STEP, f"resumed from step {event['step']} instead of {KILL_STEP}")
        require(event["source"] == "ram", f"resumed from {event['source']} instead of RAM")
        if event["rank"] == 0:
            say(f"resumed from step {event['step']}, read from {event['source'].upper()} in {ms(event['seconds'])}")

    def check(self) -> None:
        require(self.killed_s is not None, "the ranks were never killed")
        require(len(self.resumed) == RANKS, f"{len(self.resumed)} of {RANKS} ranks resumed")
        steps = sorted(self.losses)
        first, killed, last = (self.losses[step] for step in (steps[0], KILL_STEP, steps[-1]))
        require(first > killed > last, f"the loss did not fall: {first:.3f}, {killed:.3f}, {last:.3f}")
        resumed = self.losses[min(step for step in steps if step > KILL_STEP)]
        require(resumed < first / 2, f"the loss after the restart, {resumed:.3f}, is that of a new adapter")
        newest = async_ckpt.latest(DIRECTORY)
        require(newest is not None and newest.name == f"checkpoint-{steps[-1]}", f"the newest checkpoint is {newest}")


def committed_so_far(newest: Path | None) -> str:
    if newest is not None and newest.name == f"checkpoint-{KILL_STEP}":
        return "its commit was quicker than the kill"
    return f"newest committed: {newest.name if newest else 'none'}"


def train(story: Story) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
               "--max-restarts=1", str(HERE / "demo_rank.py"), str(DIRECTORY)]  # fmt: skip
    with LOG.open("w") as stderr, torchrun(command, stderr) as agent:
        assert agent.stdout is not None
        for line in agent.stdout:
            if line.startswith(MARK):
                story.hear(json.loads(line.removeprefix(MARK)))
            else:
                say(line.rstrip())
        require(agent.wait() == 0, f"the training ended with exit code {agent.returncode}")


@contextlib.contextmanager
def torchrun(command: list[str], stderr: TextIO) -> Iterator[subprocess.Popen[str]]:
    agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield agent
    finally:
        agent.terminate()  # SIGTERM: the agent takes its ranks along, which SIGKILL would leave behind
        agent.wait()


def show_continuations() -> None:
    command = [sys.executable, str(HERE / "generate.py"), str(DIRECTORY / "latest")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    require(done.returncode == 0, f"PEFT could not load the checkpoint:\n{done.stderr}")
    say("prompt The Zen of Python, by Tim Peters / Beautiful is ...")
    base, _, tuned = done.stdout.partition("\ntuned\n")
    base = base.removeprefix("base\n")
    for name, text in (("base", base), ("tuned", tuned)):
        for number, line in enumerate(line for line in text.splitlines() if line.strip()):
            wrapped = textwrap.wrap(line, 100)
            for part_number, part in enumerate(wrapped):
                say(f"{name if number + part_number == 0 else '':6} {part}")
    require(tuned.strip() != base.strip(), "the tuned model says the same as the base model")
    zen = subprocess.check_output([sys.executable, "-m", "this"], text=True)
    require(tuned.strip()[:40] in zen, f"the tuned model does not know the text: {tuned!r}")


def show_costs(story: Story) -> None:
    ours_s = [max(stalls_s) for stalls_s in zip(*story.stalls_s.values(), strict=True)]
    rows = [("way of saving", "p50", "max", "gathered"),
            ("async_ckpt: save() and fence", ms(median(ours_s)), ms(max(ours_s)), "nothing")]  # fmt: skip
    for way in ("adapter", "model"):
        cost = story.gathered[way]
        rows.append((f"gather {way}, save_pretrained", ms(cost["p50_s"]), ms(cost["max_s"]), megabytes(cost["bytes"])))
        require(cost["same_file"], "save_pretrained of the gathered tensors gives another file")
    for name, p50, longest, gathered in rows:
        say(f"{name:32} {p50:>12} {longest:>12} {gathered:>12}")
    say(f"async_ckpt: {len(ours_s)} saves in the training above, on the slower rank; optimizer state included.")
    say("The others: 3 saves each of the same FSDP2 model, afterwards: the adapter alone, and not fsynced.")
    say("All three wrote the same adapter_model.safetensors, byte for byte.")


def saver_pids() -> list[int]:
    """The embedded saver of the demo's directory: those of other jobs are none of its business."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                if b"async_ckpt_saver" in arguments and os.fsencode(DIRECTORY) in arguments:
                    pids.append(int(entry.name))
    return pids


def images() -> list[Path]:
    """The demo's images in shared memory, by the directory that their journal names."""
    found = []
    for journal in SHM.glob("*/run.msgpack"):
        with contextlib.suppress(OSError):
            if os.fsencode(DIRECTORY) in journal.read_bytes():
                found.append(journal.parent)
    return found


def check_nothing_left() -> None:
    deadline_s = time.monotonic() + END_LIMIT_S
    while (saver_pids() or images()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    require(not saver_pids(), f"the saver still runs: pids {saver_pids()}")
    require(not images(), f"shared memory still holds {images()}")


def main() -> int:
    started_s = time.monotonic()
    os.environ.update(ENVIRONMENT)
    print(f"async_ckpt demo: SmolLM2-135M, LoRA on all linear layers, FSDP2 on {RANKS} CPU ranks; "
          f"torch {version('torch')}, peft {version('peft')}")  # fmt: skip
    try:
        tell_story()
    except ClaimFailed as failed:
        print(f"\ndemo FAILED: {failed}\nstderr of the ranks: {LOG}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the saver ends by itself within 20 s", file=sys.stderr)
        return 130
    print(f"\nEvery claim held; no process and no shared memory is left. {time.monotonic() - started_s:.0f} s in all.")
    return 0


def tell_story() -> None:
    require(not saver_pids(), f"another demo is still running in this checkout: saver, pids {saver_pids()}")
    prepare()
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    DIRECTORY.parent.mkdir(exist_ok=True)
    heading(f"1. Train, save every other step, kill all ranks behind the save of step {KILL_STEP}")
    story = Story()
    train(story)
    story.check()
    heading("4. Plain PEFT loads it: PeftModel.from_pretrained(base, 'runs/demo/latest')")
    show_continuations()
    heading("5. How long the training stood still for one save")
    show_costs(story)
    check_nothing_left()


if __name__ == "__main__":
    sys.exit(main())
