"""Whole jobs for tests: ranks that can be killed, savers that can be found, and proof that all of them are gone.

Ranks are real processes joined by gloo, as torchrun makes them; only their imports are shared: a fork server has torch,
transformers and peft loaded, so a rank is there in milliseconds instead of seconds, and a test can afford to kill
many. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from tests.ranks import ROOT, RanksError
from tests.system.rank_process import be_rank, fork_server, rendezvous

T = TypeVar("T")
_HOME_VARIABLE = "ASYNC_CKPT_TEST_HOME"
_starting = threading.Lock()  # multiprocessing's table of children is not made for several threads


@functools.cache
def home() -> Path:
    """The folder of everything that this test session makes; its name tells our savers and runs from anybody's.

    A rank is told the one of its test.
    """
    return Path(os.environ.get(_HOME_VARIABLE) or tempfile.mkdtemp(prefix="ackpt-", dir="/tmp"))


def remove_home() -> None:
    shutil.rmtree(home(), ignore_errors=True)


def environment() -> dict[str, str]:
    """For savers and ranks. Embedded savers live below TMPDIR, so they are found by it."""
    inherited = {name: value for name, value in os.environ.items() if name != "ASYNC_CKPT_SAVER"}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "service")]),
        "TMPDIR": str(home()),
        _HOME_VARIABLE: str(home()),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def until(condition: Callable[[], T], what: str, timeout_s: float = 60.0) -> T:
    """The first true answer of `condition`. Raises AssertionError naming `what` if there is none in time."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := condition()):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"after {timeout_s:g} s still not: {what}")
        time.sleep(0.005)
    return answer


def savers(within: Path | None = None) -> list[int]:
    """The pids of living savers whose command line names a path in `within` (default: all of this session)."""
    marks = (b"async_ckpt_saver", os.fsencode(within or home()))
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes()  # empty for a zombie
            if all(mark in arguments for mark in marks) and b"unshare" not in arguments.split(b"\0")[0]:
                found.append(int(folder.name))
    return sorted(found)


def the_saver(within: Path) -> int:
    """The one saver that writes to `within`; the process that detaches it may still be going."""
    return until(lambda: (found := savers(within)) and len(found) == 1 and found[0], f"one saver of {within}")


def runs() -> list[Path]:
    """What savers of this session hold in shared memory, found by their endpoints: no journal has to be whole."""
    found: list[Path] = []
    for folder, _, names in os.walk(home()):
        for name in names:
            if name.endswith(".sock.lock"):
                endpoint = f"ipc://{folder}/{name.removesuffix('.lock')}"
                found += _shared().glob(f"{hashlib.sha256(endpoint.encode()).hexdigest()[:12]}-*")
    return found


def runs_of(directory: Path) -> list[Path]:
    """Those in shared memory whose journal names `directory`."""
    found = []
    for run in _shared().glob("*"):
        with contextlib.suppress(OSError):
            if os.fsencode(directory) in (run / "run.msgpack").read_bytes():
                found.append(run)
    return found


def _shared() -> Path:
    return Path(f"/dev/shm/async-ckpt-{os.getuid()}")


def assert_torch_free(pid: int) -> None:
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "msgspec" in maps, f"process {pid} does not look like a saver"
    assert "torch" not in maps
    assert "numpy" not in maps


def end_leftovers() -> None:
    """So that one failed test does not fail those after it."""
    for pid in savers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for run in runs():
        shutil.rmtree(run, ignore_errors=True)


class Daemon:
    """`async-ckpt-saver run` as a service manager starts it. `wrapper` goes before the command."""

    def __init__(
        self, folder: Path, root: Path, *options: str, wrapper: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.socket = folder / "saver.sock"
        self.endpoint = f"ipc://{self.socket}"
        self.log = folder / "saver.log"
        command = [*wrapper, sys.executable, "-m", "async_ckpt_saver", "run", "--bind", self.endpoint,
                   "--root", str(root), *options]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment() | dict(env or {}), stdout=log, stderr=log, start_new_session=True
            )

    def up(self) -> Daemon:
        until(lambda: self.socket.exists() or self.process.poll() is not None, "the daemon's socket")
        assert self.process.poll() is None, self.log.read_text()
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit status. A stopped process gets the signal all the same."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            if number != signal.SIGKILL:
                self.process.send_signal(signal.SIGCONT)
        return self.process.wait(60)

    def __enter__(self) -> Daemon:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(signal.SIGTERM if kind is None else signal.SIGKILL)


class Job:
    """`target` ("module:function") on `world` ranks, each called with the folder of the job and `args`. `each` are
    the variables of one rank alone, by its number."""

    def __init__(
        self, target: str, world: int, folder: Path, *args: str, env: Mapping[str, str] | None = None,
        each: Sequence[Mapping[str, str]] = (),
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.target, self.world, self.folder = target, world, folder
        number = len(list(folder.glob("log-*"))) // world
        self.logs = [folder / f"log-{number}-rank-{rank}" for rank in range(world)]
        common = environment() | rendezvous(world) | dict(env or {})
        self._processes = []
        for rank, log in enumerate(self.logs):
            log.touch()
            variables = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(each[rank] if each else {})
            with _starting:
                process = fork_server(environment).Process(
                    target=be_rank, args=(target, str(folder), args, variables, str(log)), daemon=True
                )
                process.start()
            self._processes.append(process)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def statuses(self) -> list[int | None]:
        with _starting:
            return [process.exitcode for process in self._processes]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def kill(self, *ranks: int) -> None:
        """SIGKILL these ranks, all by default, and wait until they are gone."""
        with _starting:
            for rank in ranks or range(self.world):
                self._processes[rank].kill()
        until(lambda: all(self.statuses[rank] is not None for rank in ranks or range(self.world)), "ranks killed")

    def wait(self, timeout_s: float = 120.0, *, expected: int = 0) -> None:
        """Raises RanksError, with what the ranks printed, unless all of them exit with status `expected`."""
        deadline_s = time.monotonic() + timeout_s
        while None in (statuses := self.statuses):
            wrong = [status for status in statuses if status not in (None, expected)]
            if wrong or time.monotonic() > deadline_s:
                time.sleep(1.0 if wrong else 0.0)  # let the others say what they saw
                break
            time.sleep(0.01)
        statuses = self.statuses
        self.kill()
        if statuses != [expected] * self.world:
            raise RanksError(f"{self.target}: exit statuses {statuses}, expected {expected}\n{self.printed()}")

    def printed(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-5000:]}" for log in self.logs)

    def reach(self, mark: str, timeout_s: float = 60.0) -> None:
        """Wait until a rank has called `training.reached(mark)`."""
        wanted = self.folder / f"reached-{mark}"
        until(lambda: wanted.exists() or any(self.statuses), f"{mark} in {self.target}", timeout_s)
        if not wanted.exists():
            raise RanksError(f"{self.target}: exit statuses {self.statuses} before {mark}\n{self.printed()}")


def run_cases(
    module: str,
    names: Sequence[str],
    world: int,
    folder: Path,
    timeout_s: float = 280.0,
    *,
    env: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run these of the functions in `module.CASES` on `world` ranks, each in a folder of its own, one after the other.

    Returns what failed in each, "" where nothing did.
    """
    with Job("tests.system.processes:several_cases", world, folder, module, *names, env=env) as job:
        try:
            job.wait(timeout_s)
        except RanksError as error:
            report = folder / "report.json"
            results = json.loads(report.read_text()) if report.exists() else {}
            return {name: results.get(name, f"the launch failed: {error}") for name in names}
    results = json.loads((folder / "report.json").read_text())
    assert list(results) == list(names)
    return results


def several_cases(folder: str, module: str, *names: str) -> None:
    """One rank's side of `run_cases`."""
    import torch.distributed as dist

    results: dict[str, str] = {}
    for name in names:
        failure = ""
        print(f"=== {name}", flush=True)
        try:
            importlib.import_module(module).CASES[name](Path(folder, name))
        except Exception:
            failure = f"rank {dist.get_rank()}: {traceback.format_exc()}\n"
            print(failure, flush=True)
        failures: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        results[name] = "".join(failures)
        if dist.get_rank() == 0:
            Path(folder, "report.json").write_text(json.dumps(results))


Scenario = Callable[[Path], Mapping[str, str] | None]


def run_together(scenarios: Mapping[str, Scenario], folder: Path, at_once: int) -> dict[str, str]:
    """Run scenarios side by side, since most of their time is waiting for a saver to end; "" for each that passed.

    One that answers with results of its own, as `run_cases` does, is replaced by them.
    """

    def run(name: str) -> Mapping[str, str]:
        try:
            results = scenarios[name](folder / name)
        except BaseException:
            return {name: traceback.format_exc()}
        return {name: ""} if results is None else results

    fork_server(environment)
    with ThreadPoolExecutor(at_once) as pool:
        return {name: failure for results in pool.map(run, scenarios) for name, failure in results.items()}
