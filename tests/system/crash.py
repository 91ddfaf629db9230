"""Kills at random moments, many times: what was acknowledged is never lost, nothing torn or partial is ever published.

    python -m tests.system.crash --trials 100 --seed 1

A trial trains on two ranks with a real saver, saves in every step, kills somebody at a random moment, starts the job
again, and looks at what lies in the directory. Every trained value equals the number of its step while it is saved, and
another number right afterwards, so a torn copy shows. Prints a line a scenario and exits with 1 if any promise broke.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import xxhash

from tests.ranks import RanksError
from tests.system.processes import Job, end_leftovers, home, runs, savers, the_saver, until

WORLD = 2
STEPS = 40
ADAPTER = "adapter_model.safetensors"


def train(folder: str) -> None:
    """Save in every step, and note what the saver had acknowledged before going on."""
    import torch

    from async_ckpt import attach
    from tests.system.training import rank, reached, trained, wrapped

    model = wrapped("fsdp2")
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    acks = os.open(Path(folder, f"acks-{rank()}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with attach(model, optimizer, directory=Path(folder, "runs"), timeout_s=20) as ckpt:
        resumed = ckpt.restore()
        for step in range(resumed.step + 1 if resumed else 1, STEPS + 1):
            with torch.no_grad():
                for parameter in trained(model):
                    parameter.fill_(step)
            handle = ckpt.save(step)
            for parameter in trained(model):
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            handle.staged()
            os.write(acks, f"{step}\n".encode())
            if step == 2:
                reached(folder, "training")


def resume(folder: str) -> None:
    """The next start: it must find at least what was acknowledged."""
    import torch

    from async_ckpt import attach
    from tests.system.training import trained, wrapped

    model = wrapped("fsdp2")
    with attach(model, directory=Path(folder, "runs"), timeout_s=30) as ckpt:
        restored = ckpt.restore()
        assert restored is not None
        assert restored.step >= max(acknowledged(Path(folder)))
        for parameter in trained(model):
            local = parameter._local_tensor  # type: ignore[attr-defined]
            assert bool((local == restored.step).all()), f"{restored.step}: {torch.unique(local)}"


def acknowledged(folder: Path) -> set[int]:
    return {int(line) for path in folder.glob("acks-*") for line in path.read_text().split()}


def all_ranks(job: Job, folder: Path, pause: Callable[[], None]) -> None:
    pause()
    job.kill()


def one_rank(job: Job, folder: Path, pause: Callable[[], None]) -> None:
    pause()
    job.kill(random.randrange(WORLD))
    until(lambda: None not in job.statuses, "the other rank ends", 60)


def the_saver_alone(job: Job, folder: Path, pause: Callable[[], None]) -> None:
    """Training must reach its end as if nothing had happened."""
    pause()
    kill_saver(folder)
    job.wait(60)
    assert max(acknowledged(folder)) == STEPS


def saver_then_ranks(job: Job, folder: Path, pause: Callable[[], None]) -> None:
    pause()
    kill_saver(folder)
    job.kill()


def ranks_then_saver(job: Job, folder: Path, pause: Callable[[], None]) -> None:
    pause()
    job.kill()
    kill_saver(folder)


def saver_twice(job: Job, folder: Path, pause: Callable[[], None]) -> None:
    the_saver_alone_once(folder, pause)
    the_saver_alone_once(folder, pause)
    job.wait(60)
    assert max(acknowledged(folder)) == STEPS


def the_saver_alone_once(folder: Path, pause: Callable[[], None]) -> None:
    pause()
    kill_saver(folder)


def kill_saver(folder: Path) -> None:
    for pid in savers(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


SCENARIOS = [all_ranks, one_rank, the_saver_alone, saver_then_ranks, ranks_then_saver, saver_twice]


def trial(scenario: Callable[[Job, Path, Callable[[], None]], None], folder: Path, seed: int) -> None:
    """Raises AssertionError or RanksError if a promise broke."""
    random.seed(seed)

    def pause() -> None:
        time.sleep(random.uniform(0, 0.4))  # the moment is what is drawn; nothing waits for it

    with Job("tests.system.crash:train", WORLD, folder) as job:
        job.reach("training")
        the_saver(folder)
        scenario(job, folder, pause)
    with Job("tests.system.crash:resume", WORLD, folder) as job:
        job.wait(90)
    until(lambda: not savers(folder), "the saver ended", 30)
    check(folder)


def check(folder: Path) -> None:
    directory = folder / "runs"
    committed = {int(path.name.removeprefix("checkpoint-")): path for path in directory.glob("checkpoint-*")}
    assert acknowledged(folder)
    assert acknowledged(folder) <= committed.keys(), f"lost: {sorted(acknowledged(folder) - committed.keys())}"
    assert os.readlink(directory / "latest") == f"checkpoint-{max(committed)}"
    strangers = [p.name for p in directory.iterdir() if p.name != "latest" and p not in committed.values()]
    assert strangers == []
    for step, path in committed.items():
        check_whole(path, step)


def check_whole(path: Path, step: int) -> None:
    manifest = json.loads((path / "async_ckpt.json").read_bytes())
    assert manifest["step"] == step
    files = {each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file()} - {"async_ckpt.json"}
    assert files == manifest["files"].keys()
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert len(content) == entry["bytes"]
        assert xxhash.xxh3_128_hexdigest(content) == entry["xxh3_128"], f"{path / name} is damaged"
    content = (path / ADAPTER).read_bytes()
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    values = memoryview(content[header_bytes:]).cast("f")
    assert len(values) > 0
    assert set(values) == {float(step)}, f"step {step} is torn: {sorted(set(values))[:5]}"


def run_trials(trials: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Passed trials by scenario, and what broke."""
    passed: Counter[str] = Counter()
    broken = []
    for number in range(trials):
        scenario = SCENARIOS[number % len(SCENARIOS)]
        folder = home() / f"c{number}"
        folder.mkdir()
        try:
            trial(scenario, folder, seed * 100_000 + number)
        except (AssertionError, RanksError) as error:
            broken.append(f"{scenario.__name__}, seed {seed}, trial {number}: {error}")
            end_leftovers()
        else:
            passed[scenario.__name__] += 1
            shutil.rmtree(folder)
    return passed, broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started_s = time.monotonic()
    passed, broken = run_trials(options.trials, options.seed)
    for scenario in SCENARIOS:
        print(f"{scenario.__name__:20} {passed[scenario.__name__]:4} passed")
    for line in broken:
        print(f"BROKEN {line}")
    left = [*savers(), *runs()]
    print(
        f"{sum(passed.values())} of {options.trials} trials, {time.monotonic() - started_s:.0f} s; left behind: {left}"
    )
    raise SystemExit(bool(broken or left))


if __name__ == "__main__":
    main()
