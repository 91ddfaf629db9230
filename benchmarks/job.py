"""A benchmark job: every way saves the same model, in interleaved repetitions."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import measure
from .catalogue import shapes
from .gpu import gpu_section
from .limits import Dd, Memcpy, SequentialWrite
from .loop import Loop
from .ours import Overlap
from .shapes import Shape, Subject, build, local_bytes, total_bytes
from .ways import WAYS, Way

_IDLE_S = 5.0
_SETTLE_S = 0.1


class Bench:
    """All ways of one shape, set up side by side. Every method is called by all ranks together."""

    def __init__(self, shape: Shape, folder: Path, *, quick: bool) -> None:
        self.shape = shape
        self.folder = folder
        self.quick = quick
        self.subject: Subject = build(shape)
        self.ways: dict[str, Way] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.detached: list[int] = []
        self.number = 0
        self.loop = Loop(self.subject.locals, steps=5 if quick else 40)
        gc.collect()
        gc.freeze()  # the model's many objects are the same for all ways: no collection walks them while one is timed

    def run(self) -> dict[str, Any]:
        for name in self.shape.ways:
            self._introduce(name)
        limits: dict[str, list[float]] = {}
        own_bytes = local_bytes(list(_locals(self.subject)))
        memcpy = Memcpy(own_bytes)
        writes, dd = self._writers()
        order = random.Random(1)
        for _ in range(self.shape.repetitions):
            names = [*self.shape.ways, "limits"]
            order.shuffle(names)
            for name in names:
                if name != "limits":
                    self.found[name]["saves"].append(self._save(name))
                    continue
                dist.barrier()
                limits.setdefault("memcpy", []).append(memcpy.run())
                if writes is not None and dd is not None:
                    self._write_limits(limits, writes, dd)
        for _ in range(self.shape.loops):
            names = list(self.shape.ways)
            order.shuffle(names)
            for name in names:
                self.found[name]["loops"].append(self._loop(name))
        restores = self._restores() if self.shape.restores else {}
        idle = self._idle() if self.shape.restores else {}
        for name in self.shape.ways:
            self.found[name].update(self._footprint(name))
        gpu = gpu_section(self.subject, self.folder / "gpu") if self.shape.restores else None
        for way in self.ways.values():
            dist.barrier()
            way.teardown()
        if writes is not None and dd is not None:
            writes.close()
            dd.close()
        return {
            "bytes": total_bytes(self.subject),
            "ways": self.found,
            "limits": limits,
            "restores": restores,
            "idle_cpu": idle,
            "gpu": gpu,
        }

    # --- one way ---------------------------------------------------------------------------------------------------

    def _introduce(self, name: str) -> None:
        """Set a way up and let it save for the first time, which is when most of them do the rest of their setup."""
        way = self.ways[name] = WAYS[name]()
        folder = self.folder / name
        dist.barrier()
        children = set(measure.children(os.getpid()))
        started_s = time.perf_counter()
        way.setup(self.subject, folder)
        setup_s = time.perf_counter() - started_s
        self.detached += way.detached()
        self.found[name] = {
            "title": way.title,
            "durable": way.durable,
            "setup_s": setup_s,
            "first": self._save(name),
            "saves": [],
            "loops": [],
        }
        helpers = set(measure.children(os.getpid())) - children
        self.found[name]["helper_pids"] = sorted(helpers) + way.detached()

    def _target(self, name: str) -> Path:
        """A new directory for each save. Those of earlier saves stay: their blocks and pages are not reused."""
        self.number += 1
        return self.folder / name / f"checkpoint-{self.number}"

    def _save(self, name: str) -> dict[str, float]:
        """One save, with nothing beside it: the call, the wait that a step right behind it would have, the end."""
        way, target = self.ways[name], self._target(name)
        gc.collect()
        dist.barrier()
        cpu_s = self._cpu_s()
        started_s = time.perf_counter()
        way.save(target)
        called_s = time.perf_counter()
        way.fence()
        fenced_s = time.perf_counter()
        way.wait()
        ended_s = time.perf_counter()
        used_s = self._cpu_s() - cpu_s
        dist.barrier()
        self._settle()
        self._last = target
        return {
            "call_s": called_s - started_s,
            "fence_s": fenced_s - called_s,
            "durable_s": ended_s - started_s,
            "cpu_s": used_s,
        }

    def _loop(self, name: str) -> dict[str, float]:
        """The same steps without and with a save among them: what the save costs the loop in all."""
        way, target = self.ways[name], self._target(name)
        dist.barrier()
        idle = self.loop.run(None, way.fence)
        dist.barrier()
        saving = self.loop.run(lambda: way.save(target), way.fence)
        started_s = time.perf_counter()
        way.wait()
        late_s = time.perf_counter() - started_s
        dist.barrier()
        self._settle()
        return {"idle_s": idle.total_s, "saving_s": saving.total_s, "late_s": late_s, "idle_step_s": idle.step_s}

    def _footprint(self, name: str) -> dict[str, Any]:
        pids = self.found[name].pop("helper_pids")
        written = sorted((self.folder / name).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        return {
            "helpers": [measure.memory_bytes(pid) for pid in pids],
            "disk_bytes": measure.disk_bytes(written[-1]) if dist.get_rank() == 0 else 0,
        }

    def _cpu_s(self) -> float:
        return measure.cpu_s([os.getpid(), *measure.children(os.getpid()), *self.detached])

    def _settle(self) -> None:
        """Nobody pays for pages that another way has left dirty, nor for threads that it has not ended yet."""
        if dist.get_rank() == 0:
            os.sync()
        time.sleep(_SETTLE_S)
        dist.barrier()

    # --- beside the ways -------------------------------------------------------------------------------------------

    def _writers(self) -> tuple[SequentialWrite | None, Dd | None]:
        if dist.get_rank() != 0:
            return None, None
        nbytes = total_bytes(self.subject)
        return SequentialWrite(nbytes), Dd(nbytes)

    def _write_limits(self, limits: dict[str, list[float]], writes: SequentialWrite, dd: Dd) -> None:
        kinds: dict[str, Callable[[Path], float]] = {
            "write O_DIRECT, fdatasync": lambda path: writes.run(path, direct=True),
            "write buffered, fdatasync": lambda path: writes.run(path, direct=False),
            "dd oflag=direct conv=fdatasync": dd.run,
        }
        for kind, run in kinds.items():
            times = limits.setdefault(kind, [])
            times.append(run(self.folder / f"{kind}-{len(times)}"))
            os.sync()

    def _restores(self) -> dict[str, list[float]]:
        """From RAM and from a cold disk, and one flat copy of the same bytes; each overwritten in between."""
        way = self.ways["overlap"]
        assert isinstance(way, Overlap)
        expected = [tensor.clone() for tensor in self.subject.locals]
        last = self._target("overlap")
        way.save(last)
        way.wait()
        found: dict[str, list[float]] = {"ram": [], "disk": [], "memcpy": []}
        memcpy = Memcpy(local_bytes(expected))
        for _ in range(self.shape.repetitions):
            for kind in ("ram", "disk"):
                torch._foreach_zero_(self.subject.locals)
                if kind == "disk" and dist.get_rank() == 0:
                    measure.drop_from_page_cache(last)
                dist.barrier()
                started_s = time.perf_counter()
                restored = way.ckpt.restore(self.number if kind == "ram" else last)
                found[kind].append(time.perf_counter() - started_s)
                assert restored is not None
                assert restored.source == kind
                assert all(map(torch.equal, expected, self.subject.locals))
            dist.barrier()
            found["memcpy"].append(memcpy.run())
        return found

    def _idle(self) -> dict[str, float]:
        """The part of one core that each way's helpers use while nothing is saved."""
        seconds = 0.5 if self.quick else _IDLE_S
        pids = {name: self.found[name]["helper_pids"] for name in self.shape.ways}
        dist.barrier()
        before_s = {name: measure.cpu_s(pids[name]) for name in pids}
        time.sleep(seconds)
        return {name: (measure.cpu_s(pids[name]) - before_s[name]) / seconds for name in pids}


def _locals(subject: Subject) -> list[torch.Tensor]:
    return [getattr(tensor, "_local_tensor", tensor) for tensor in subject.state().values()]


def merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of all ranks': the slowest rank's time, the sum of CPU seconds, everyone's helpers."""
    whole = ranks[0]
    for name, way in whole["ways"].items():
        others = [rank["ways"][name] for rank in ranks]
        way["setup_s"] = max(other["setup_s"] for other in others)
        way["first"] = _worst([other["first"] for other in others])
        way["saves"] = [_worst(list(each)) for each in zip(*(other["saves"] for other in others), strict=True)]
        way["loops"] = [_worst(list(each)) for each in zip(*(other["loops"] for other in others), strict=True)]
        way["helpers"] = [helper for other in others for helper in other["helpers"]]
    for kind in ("memcpy",):
        whole["limits"][kind] = [max(each) for each in zip(*(rank["limits"][kind] for rank in ranks), strict=True)]
    for kind in whole["restores"]:
        whole["restores"][kind] = [max(each) for each in zip(*(r["restores"][kind] for r in ranks), strict=True)]
    for name in whole["idle_cpu"]:
        whole["idle_cpu"][name] = sum(rank["idle_cpu"][name] for rank in ranks)
    return whole


def _worst(of_ranks: list[dict[str, float]]) -> dict[str, float]:
    return {
        key: sum(each[key] for each in of_ranks) if key == "cpu_s" else max(each[key] for each in of_ranks)
        for key in of_ranks[0]
    }


def run(name: str, ways: tuple[str, ...] | None, folder: Path, out: Path, *, quick: bool) -> None:
    """What every rank of a job does; rank 0 writes `out`."""
    torch.set_num_threads(1)
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    shape = shapes(quick=quick)[name]
    if ways is not None:
        shape = replace(shape, ways=ways)
    result = Bench(shape, folder, quick=quick).run()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, result)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(merged(gathered)))
        shutil.rmtree(folder)
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # tearing down gloo may hang
