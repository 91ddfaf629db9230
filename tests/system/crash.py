"""Kills, many times: what was acknowledged or staged is never lost, nothing torn or partial is ever published.

    python -m tests.system.crash --trials 400 --seed 1

A trial trains on two ranks with a real saver, saves in every step, kills somebody, starts the job again, and looks at
what lies in the directory: right after the kill, and when everything has ended. Every trained value equals the number
of its step while it is saved, and another number right afterwards, so a torn copy shows.

Half of the trials kill at random moments. The others kill the saver just before a chosen system call, each one that it
makes once (`dying_saver`). Prints how often each scenario and each point was passed; exits with 1 if a promise broke.
"""

from __future__ import annotations

import argparse
import multiprocessing.util
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import RanksError
from tests.system import crash_checks
from tests.system.crash_checks import noted
from tests.system.dying_saver import wrapper
from tests.system.processes import Daemon, Job, home, remove_home, runs, runs_of, savers, the_saver, until

WORLD = 2
STEPS = 40
KEEP_LAST = 5  # where the saver's system calls are chosen: those of retention are among them
# Two chunks and a rest for the writer; bytes enough that a kill by chance lands in a write.
_RANK = 600


def train(folder: str, keep_last: str = "") -> None:
    """Save in every step, and note what was staged everywhere, and what was acknowledged, before going on."""
    import torch

    from async_ckpt import attach
    from tests.system.training import rank, reached, trained

    model = make_model()
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    staged, committed = (crash_checks.open_notes(folder, what, rank()) for what in ("staged", "committed"))
    handles = []
    policy = {"keep_last": int(keep_last)} if keep_last else {}
    with attach(model, optimizer, directory=Path(folder, "runs"), timeout_s=20, **policy) as ckpt:
        resumed = ckpt.restore()
        for step in range(resumed.step + 1 if resumed else 1, STEPS + 1):
            with torch.no_grad():
                for parameter in trained(model):
                    parameter.fill_(step)
            handles.append(ckpt.save(step))
            for parameter in trained(model):
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            handles[-1].staged()
            crash_checks.note(staged, step)
            for handle in [handle for handle in handles if handle.state == "committed"]:
                crash_checks.note(committed, handle.step)
                handles.remove(handle)
            if step == 2:
                reached(folder, "training")


def resume(folder: str) -> None:
    """The next start: it must find at least what was staged."""
    import torch

    from async_ckpt import attach
    from tests.system.training import trained

    model = make_model()
    with attach(model, directory=Path(folder, "runs"), timeout_s=30) as ckpt:
        restored = ckpt.restore()
        assert restored is not None
        assert restored.step >= max(noted(Path(folder), "staged"))
        for parameter in trained(model):
            local = parameter._local_tensor
            assert bool((local == restored.step).all()), f"{restored.step}: {torch.unique(local)}"


def make_model() -> Any:
    from tests.system.training import wrapped
    from tests.tiny_llama import lora

    return wrapped("fsdp2", config=lora(r=_RANK, target_modules=["down_proj"]), hidden_size=384, intermediate_size=1500)


# --- random moments ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    job: Job
    folder: Path
    chance: random.Random

    def pause(self) -> None:
        time.sleep(self.chance.uniform(0, 0.4))  # the moment is what is drawn; nothing waits for it

    def kill_saver(self) -> None:
        for pid in savers(self.folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def train_to_the_end(self) -> None:
        self.job.wait(60)
        assert max(noted(self.folder, "staged")) == STEPS


def all_ranks(trial: Trial) -> None:
    trial.pause()
    trial.job.kill()


def one_rank(trial: Trial) -> None:
    trial.pause()
    trial.job.kill(trial.chance.randrange(WORLD))
    until(lambda: None not in trial.job.statuses, "the other rank ends", 60)


def the_saver_alone(trial: Trial) -> None:
    """Training must reach its end as if nothing had happened."""
    trial.pause()
    trial.kill_saver()
    crash_checks.check_published(trial.folder, None)
    trial.train_to_the_end()


def saver_then_ranks(trial: Trial) -> None:
    trial.pause()
    trial.kill_saver()
    trial.job.kill()


def ranks_then_saver(trial: Trial) -> None:
    trial.pause()
    trial.job.kill()
    trial.kill_saver()


def saver_twice(trial: Trial) -> None:
    for _ in range(2):
        trial.pause()
        trial.kill_saver()
    trial.train_to_the_end()


SCENARIOS = [all_ranks, one_rank, the_saver_alone, saver_then_ranks, ranks_then_saver, saver_twice]


def at_random(scenario: Callable[[Trial], None], folder: Path, chance: random.Random) -> None:
    """Raises AssertionError or RanksError if a promise broke."""
    with Job("tests.system.crash:train", WORLD, folder) as job:
        job.reach("training")
        the_saver(folder)
        scenario(Trial(job, folder, chance))
    crash_checks.check_published(folder, None)
    with Job("tests.system.crash:resume", WORLD, folder) as job:
        job.wait(90)
    until(lambda: not savers(folder), "the saver ended", 30)
    crash_checks.check_final(folder, None)


# --- chosen system calls -------------------------------------------------------------------------------------------


def at_point(point: str, occurrence: int, ranks_too: bool, folder: Path) -> None:
    """The saver dies just before `point`, alone or followed by the ranks; the next saver, and the next job, go on."""
    log = folder / "points"
    dying = Daemon(folder / "d", folder, wrapper=wrapper(log, point, occurrence))  # it may die before it is up
    with Job("tests.system.crash:train", WORLD, folder, str(KEEP_LAST), env=_named(dying)) as job:
        until(lambda: dying.process.poll() is not None or None not in job.statuses, f"death at {point}", 60)
        if dying.process.poll() is None:  # a point of its own end
            dying.process.terminate()
        assert dying.process.wait(30) == -signal.SIGKILL, f"{point} was not reached {occurrence} times"
        assert log.read_text().splitlines()[-1] == point
        if ranks_too:
            job.kill()
        crash_checks.check_published(folder, KEEP_LAST)
        with Daemon(folder / "d", folder, "--keep-image-s", "20") as next_saver:
            if not ranks_too:
                job.wait(60)
                assert max(noted(folder, "staged")) == STEPS
            with Job("tests.system.crash:resume", WORLD, folder, env=_named(next_saver)) as resumed:
                resumed.wait(90)
            until(lambda: not runs_of(folder / "runs"), "no slot is left", 30)
    crash_checks.check_final(folder, KEEP_LAST)


def points(folder: Path, *, wrapped_by: Callable[[Path], Sequence[str]] | None = None) -> Counter[str]:
    """How often a saver that nobody kills passes each point, from its start to its end, for one job."""
    folder.mkdir()
    log = folder / "points"
    before = wrapped_by(log) if wrapped_by is not None else wrapper(log, "", 0)
    with Daemon(folder / "d", folder, wrapper=before) as saver:
        with Job("tests.system.crash:train", WORLD, folder, str(KEEP_LAST), env=_named(saver)) as job:
            job.wait(60)
        until(lambda: not runs_of(folder / "runs"), "no slot is left", 30)
    until(lambda: not savers(folder), "whoever watched the saver has ended")
    return Counter(log.read_text(errors="replace").splitlines())


def _named(saver: Daemon) -> dict[str, str]:
    return {"ASYNC_CKPT_SAVER": saver.endpoint}


# --- all of it -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    name: str
    broken: str = ""


def run_trials(trials: Sequence[tuple[str, Callable[[Path], None]]], at_once: int) -> list[Result]:
    """Each is (name, what to do in a folder of its own)."""

    def run(numbered: tuple[int, tuple[str, Callable[[Path], None]]]) -> Result:
        number, (name, trial) = numbered
        folder = home() / f"c{number:05}"
        folder.mkdir()
        try:
            trial(folder)
        except (AssertionError, RanksError, OSError, ValueError, KeyError) as error:
            _end_leftovers(folder)
            return Result(name, f"{folder}: {error!r}")
        shutil.rmtree(folder)
        return Result(name)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(run, enumerate(trials)))


def random_trials(count: int, seed: int) -> list[tuple[str, Callable[[Path], None]]]:
    trials: list[tuple[str, Callable[[Path], None]]] = []
    for number in range(count):
        scenario, chance = SCENARIOS[number % len(SCENARIOS)], random.Random(f"{seed} {number}")
        trials.append((scenario.__name__, lambda folder, s=scenario, c=chance: at_random(s, folder, c)))
    return trials


def point_trials(passed: Counter[str], count: int, seed: int) -> list[tuple[str, Callable[[Path], None]]]:
    """At least one for each point; those of a commit, of which there are more, at any of the commits."""
    trials: list[tuple[str, Callable[[Path], None]]] = []
    for number in range(max(count, len(passed))):
        point, chance = sorted(passed)[number % len(passed)], random.Random(f"{seed} {number}")
        in_each_save = passed[point] >= STEPS // 2
        occurrence = chance.randint(2, passed[point] * 3 // 4) if in_each_save else chance.randint(1, passed[point])
        ranks_too = in_each_save and chance.random() < 0.5  # else they may have staged nothing yet
        trials.append((point, lambda folder, p=point, o=occurrence, r=ranks_too: at_point(p, o, r, folder)))
    return trials


def _end_leftovers(folder: Path) -> None:
    for pid in savers(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for run in runs_of(folder / "runs"):
        shutil.rmtree(run, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=3)
    options = parser.parse_args()
    started_s = time.monotonic()
    passed = points(home() / "points")
    half = options.trials // 2
    trials = [*random_trials(options.trials - half, options.seed), *point_trials(passed, half, options.seed)]
    results = run_trials(trials, options.at_once)
    counts = Counter(result.name for result in results if not result.broken)
    print(f"seed {options.seed}; passed trials by scenario, then by the point before which the saver was killed")
    for name in [*(scenario.__name__ for scenario in SCENARIOS), *sorted(passed)]:
        print(f"{counts[name]:5}  {name}")
    broken = [result for result in results if result.broken]
    for result in broken:
        print(f"BROKEN {result.name}: {result.broken}")
    left = [*savers(), *runs()]
    duration_s = time.monotonic() - started_s
    print(f"{counts.total()} of {len(trials)} trials passed, {len(passed)} points, {duration_s:.0f} s; left: {left}")
    if not broken:
        multiprocessing.util.Finalize(None, remove_home, exitpriority=-200)  # after the fork server's own folder
    raise SystemExit(bool(broken or left))


if __name__ == "__main__":
    main()
