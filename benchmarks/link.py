"""What a relay hands over to the lead, in bytes a second, against the same network with nothing but bytes.

    python -m benchmarks.link               # about 2 minutes on 2 cores
    python -m benchmarks.link --mib 64 --rounds 2
    python -m benchmarks.link --mib 200 --copies

Both savers are on this machine and talk over loopback, so every side of every way shares its cores: what is measured is
work, not wire. Ways:
    raw tcp       one connection, sendall and recv_into one buffer
    raw CURVE     one connection of ZeroMQ with CURVE, DEALER to ROUTER, 1 MiB messages, dropped on arrival
    plain, CURVE  ours: from the image of one saver into the image of another, acknowledged; plain hashed as well
    ... copy      with --copies, replicas=1: from the commit's word until the other saver has a whole, hashed copy
Ways take turns, round after round; the first round is not counted.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import (
    PROTOCOL,
    Claim,
    FromRank,
    Granted,
    ImageFile,
    Layout,
    Lead,
    LeadOpen,
    LeadWanted,
    Options,
    Ready,
    Register,
    SaveRecord,
    Settled,
    Skipped,
    Staged,
    Started,
    decode_from_saver,
    encode,
)
from async_ckpt.core.region import Region
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import Phase, SlotPaths, StateFile, copy_paths, shm_identity

from . import measure

MESSAGE_BYTES = 1 << 20
GOAL = 0.8


def raw_tcp(total_bytes: int) -> float:
    """Seconds."""
    door = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child == 0:
        with socket.create_connection(door.getsockname()) as sender:
            data = mmap.mmap(-1, MESSAGE_BYTES)
            data.write(secrets.token_bytes(MESSAGE_BYTES))
            for _ in range(total_bytes // MESSAGE_BYTES):
                sender.sendall(data)
        os._exit(0)
    receiver, _ = door.accept()
    buffer = bytearray(MESSAGE_BYTES)
    received = 0
    begin_s = time.perf_counter()
    while count := receiver.recv_into(buffer):
        received += count
    took_s = time.perf_counter() - begin_s
    os.waitpid(child, 0)
    receiver.close()
    door.close()
    assert received == total_bytes
    return took_s


def raw_curve(total_bytes: int) -> float:
    """Seconds."""
    server_public, server_secret = zmq.curve_keypair()
    context = zmq.Context(1)
    router = context.socket(zmq.ROUTER)
    router.set(zmq.CURVE_SERVER, 1)
    router.set(zmq.CURVE_SECRETKEY, server_secret)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    child = os.fork()
    if child == 0:
        try:
            send_curve(port, server_public, total_bytes)
        finally:
            os._exit(0)
    received = 0
    begin_s = 0.0
    while received < total_bytes:
        frames = router.recv_multipart(copy=False)
        begin_s = begin_s or time.perf_counter()
        received += len(frames[1].buffer)
    took_s = time.perf_counter() - begin_s
    os.waitpid(child, 0)
    router.close()
    context.term()
    return took_s * total_bytes / (total_bytes - MESSAGE_BYTES)


def send_curve(port: int, server: bytes, total_bytes: int) -> None:
    context = zmq.Context(1)
    dealer = context.socket(zmq.DEALER)
    dealer.set(zmq.CURVE_SERVERKEY, server)
    public, secret = zmq.curve_keypair()
    dealer.set(zmq.CURVE_PUBLICKEY, public)
    dealer.set(zmq.CURVE_SECRETKEY, secret)
    dealer.set(zmq.SNDHWM, 16)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    data = mmap.mmap(-1, MESSAGE_BYTES)
    data.write(secrets.token_bytes(MESSAGE_BYTES))
    for _ in range(total_bytes // MESSAGE_BYTES):
        dealer.send(data, copy=False)
    dealer.close()
    context.term()


class _Rank:
    """Rank 0 holds one element, rank 1 all the rest."""

    def __init__(self, endpoint: str, directory: Path, rank: int, total_bytes: int, replicas: int) -> None:
        self._context = zmq.Context(1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.IDENTITY, secrets.token_bytes(16))
        self._socket.connect(endpoint)
        self._rank = rank
        self._options = Options(str(directory), 2, 2, Policy(keep_last=1), 120.0, replicas=replicas)
        self._seq = 0
        self.file = plan_file("model.safetensors", [TensorSpec("w", "U8", (total_bytes + 1,))])
        self.granted: Granted | None = None

    def say(self, message: FromRank) -> None:
        self._socket.send(encode(message))

    def hear(self, kind: type[Any]) -> Any:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            if self._socket.poll(1000):
                message = decode_from_saver(self._socket.recv())
                if isinstance(message, kind):
                    return message
        raise TimeoutError(f"no {kind.__name__}")

    def register(self, lead: Lead | None) -> None:
        whole = self.file.extents[0].spec.numel
        region = Region.run(0, 1) if self._rank == 0 else Region.run(1, whole - 1)
        layout = Layout((ImageFile(self.file.path, self.file.header, self.file.total_bytes),), {})
        self.say(
            Register(
                protocol=PROTOCOL,
                options=self._options,
                job="link",
                rank=self._rank,
                process=process_of(os.getpid()),
                launcher=None,
                shm=shm_identity(),
                layout_hash="h",
                layout=layout if self._rank == 0 else None,
                claims=pack_claims([self.file], [Claim(0, 0, region)])[0],
                versions={},
                lead=lead,
            )
        )

    def ready(self) -> None:
        self.granted = self.hear(Granted)
        self.say(Ready())

    def stage(self, step: int, slot: int, data: bytes) -> None:
        assert self.granted is not None
        paths = SlotPaths(Path(self.granted.run), slot)
        with (paths.image / self.file.path).open("r+b") as file:
            start = self.file.extents[0].start + 1
            for offset in range(0, self.file.total_bytes - start if self._rank else 0, len(data)):
                file.seek(start + offset)
                file.write(data[: self.file.total_bytes - start - offset])
        paths.write_record(self._rank, SaveRecord(step, {}, None, {}))
        StateFile(paths.state).mark(self._rank, Phase.STAGED, step)

    def report(self, step: int, slot: int) -> None:
        self._seq += 1
        self.say(Staged(seq=self._seq, slot=slot, step=step, copy_s=0.0))

    def skip(self, step: int, slot: int) -> None:
        self._seq += 1
        self.say(Skipped(seq=self._seq, slot=slot, step=step, reason="measured"))
        self.settled(step)

    def settled(self, step: int) -> str:
        while (settled := self.hear(Settled)).step != step:
            pass
        return str(settled.outcome)

    def close(self) -> None:
        self._context.destroy(0)


class Pair:
    """A lead and a relay, and a job of one rank at each."""

    def __init__(self, home: Path, total_bytes: int, *, plain: bool, replicas: int = 0) -> None:
        self._savers = []
        endpoints = []
        for name in ("lead", "relay"):
            (home / name).mkdir(mode=0o700)
            endpoints.append(f"ipc://{home}/{name}/saver.sock")
            command = [sys.executable, "-m", "async_ckpt_saver", "run", "--bind", endpoints[-1], "--root", str(home)]
            log = (home / f"{name}.log").open("wb")
            self._savers.append(subprocess.Popen([*command, "--grace-s", "0"], stdout=log, stderr=log))
        self._keeper = endpoints[1]
        self._near, self._far = (
            _Rank(each, home / "run", n, total_bytes, replicas) for n, each in enumerate(endpoints)
        )
        public, secret = (b"", b"") if plain else zmq.curve_keypair()
        self._near.say(LeadWanted(address="127.0.0.1:0", allow=public, plain=plain))
        opened = self._near.hear(LeadOpen)
        self._near.register(None)
        self._far.register(Lead(opened.endpoint, opened.server_key, public, secret))
        for rank in (self._near, self._far):
            rank.ready()
        for rank in (self._near, self._far):
            rank.hear(Started)
        assert self._near.granted is not None
        self._states = [StateFile(SlotPaths(Path(self._near.granted.run), slot).state) for slot in (0, 1)]
        self._data = secrets.token_bytes(MESSAGE_BYTES)
        self._total_bytes = total_bytes
        self._step = 0
        self._copying_cpu_s = 0.0

    def measure(self) -> float:
        """Seconds, from the rank's word until all of it is in the lead's journal."""
        self._step += 1
        slot = self._step % 2
        self._far.stage(self._step, slot, self._data)
        begin_s = time.perf_counter()
        self._far.report(self._step, slot)
        while (cell := self._states[slot].cell(1)).step != self._step or cell.phase is not Phase.STAGED:
            time.sleep(0.0005)
            assert time.perf_counter() - begin_s < 120, "never handed over"
        took_s = time.perf_counter() - begin_s
        self._near.skip(self._step, slot)
        return took_s

    def measure_copy(self) -> float:
        """Seconds, from when the lead has said that the step is committed until all of it is kept elsewhere."""
        self._step += 1
        slot = self._step % 2
        before = self._kept()
        for rank in (self._near, self._far):
            rank.stage(self._step, slot, self._data)
            rank.report(self._step, slot)
        assert self._near.settled(self._step) == "committed"
        begin_s, used_s = time.perf_counter(), self.cpu_s()
        while not self._kept() - before:
            time.sleep(0.0005)
            assert time.perf_counter() - begin_s < 120, "never copied"
        took_s = time.perf_counter() - begin_s
        self._copying_cpu_s += self.cpu_s() - used_s
        return took_s

    def copying_cpu_s(self) -> float:
        return self._copying_cpu_s

    def _kept(self) -> set[Path]:
        return {path for path in copy_paths(self._keeper) if (path / "copy.msgpack").exists()}

    def cpu_s(self) -> float:
        return measure.cpu_s(saver.pid for saver in self._savers)

    def close(self) -> None:
        for rank in (self._near, self._far):
            rank.close()
        for saver in self._savers:
            saver.send_signal(signal.SIGKILL)
            saver.wait()


def _raw_cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def take_turns(total_bytes: int, rounds: int, *, copies: bool = False) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds, of both ends together, of each way and round."""
    from async_ckpt.core.slots import links_path, read_journals, remove_run

    with tempfile.TemporaryDirectory(prefix="link-", dir="/tmp") as folder:
        pairs = {}
        try:
            for name in ("plain", "CURVE"):
                home = Path(folder) / name
                home.mkdir()
                pairs[name] = Pair(home, total_bytes, plain=name == "plain")
            ways: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
                "raw tcp": (lambda: raw_tcp(total_bytes), _raw_cpu_s),
                "plain": (pairs["plain"].measure, pairs["plain"].cpu_s),
                "raw CURVE": (lambda: raw_curve(total_bytes), _raw_cpu_s),
                "CURVE": (pairs["CURVE"].measure, pairs["CURVE"].cpu_s),
            }
            for name in ("plain copy", "CURVE copy") if copies else ():
                home = Path(folder) / name
                home.mkdir()
                pair = pairs[name] = Pair(home, total_bytes, plain=name == "plain copy", replicas=1)
                ways[name] = pair.measure_copy, pair.copying_cpu_s
            results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for number in range(rounds + 1):
                for name, (way, cpu_s) in ways.items():
                    before_s = cpu_s()
                    took_s = way()
                    if number:
                        results[name].append((took_s, cpu_s() - before_s))
            return results
        finally:
            for name, pair in pairs.items():
                pair.close()
                for side in ("lead", "relay"):
                    endpoint = f"ipc://{folder}/{name}/{side}/saver.sock"
                    for run, _ in list(read_journals(endpoint)):
                        remove_run(run)
                    for copy in copy_paths(endpoint):
                        remove_run(copy)
                    links_path(endpoint).unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="of each hand-over (512)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--copies", action="store_true", help="measure copies in the RAM of a second host as well")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or gigabytes stay in /dev/shm
    gigabytes = (options.mib << 20) / 1e9
    print(f"load {os.getloadavg()[0]:.1f} before; {options.mib} MiB, {options.rounds} rounds, medians (least to most):")
    results = take_turns(options.mib << 20, options.rounds, copies=options.copies)
    medians = {}
    for name, figures in results.items():
        speeds = [gigabytes / took_s for took_s, _ in figures]
        medians[name] = statistics.median(speeds)
        cpu_s = statistics.median(used_s for _, used_s in figures) / gigabytes
        print(f"  {name:10} {medians[name]:6.2f} GB/s  ({min(speeds):.2f} to {max(speeds):.2f})   "
              f"{cpu_s:.2f} CPU s a GB, both ends")  # fmt: skip
    fine = True
    for ours, raw in (("plain", "raw tcp"), ("CURVE", "raw CURVE")):
        part = medians[ours] / medians[raw]
        fine &= part >= GOAL
        print(f"  {ours} is {part:.2f} of {raw} (goal: {GOAL})")
        if options.copies:
            print(f"  {ours} copy is {medians[f'{ours} copy'] / medians[ours]:.2f} of {ours}")
    if options.json:
        options.json.write_bytes(msgspec.json.format(json.dumps(results).encode(), indent=2))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
