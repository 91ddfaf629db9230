"""Who may write, or remove, the objects of one step: an object store has no rename and no lock, so one small object,
created only if it is not there, stands for both.

It says who made it and for how long. After that time, by the store's own clock, its maker has given up, because a
commit ends with its `timeout_s`; on the same host a maker that is dead is seen at once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from async_ckpt.core.attempts import Attempts
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_NAME_CHARS
from async_ckpt.core.location import Url
from async_ckpt.core.manifest import checkpoint_name, parse_step
from async_ckpt.core.objects import Object, Objects
from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import Process

from .temporaries import new_nonce

log = logging.getLogger(__name__)

FOLDER = ".async-ckpt"  # beside the checkpoints
_MARGIN_S = 120.0  # the last request of a commit may begin just before its time is over
_LOOK_S = 1.0
_TRIES = 5  # against others that come and go just now
_MAX_BYTES = 64 << 10

Purpose = Literal["commit", "removal"]


class Reservation(msgspec.Struct, frozen=True):
    """`lease_s` from its making on nobody else touches the step, unless `process` on `host` is seen to be dead."""

    step: int
    run: str
    nonce: str
    purpose: Purpose
    lease_s: float
    host: str
    process: Process


class Held(msgspec.Struct, frozen=True):
    """`fresh` is False where the reservation of somebody who has given up was taken over: what lies there of the step
    is theirs. It holds until `until_s` of the monotonic clock."""

    reservation: Reservation
    fresh: bool
    until_s: float

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.until_s


class Reservations:
    """Those of the training directory at `url`."""

    def __init__(self, objects: Objects, url: Url) -> None:
        self._objects = objects
        self._url = url

    def take(self, step: int, run: str, purpose: Purpose, lease_s: float, attempts: Attempts) -> Held:
        """Wait for whoever holds the step, as long as `attempts` last. Raises CheckpointError naming the holder."""
        waiting = False
        while True:
            ours = Reservation(step, run, new_nonce(), purpose, lease_s, _host(), process_of(os.getpid()))
            until_s = time.monotonic() + lease_s
            found = self._try(ours)
            if isinstance(found, bool):
                return Held(ours, found, until_s)
            if attempts.left_s <= _LOOK_S:
                raise CheckpointError(f"{self._url / checkpoint_name(step)} {found}")
            if not waiting:
                waiting = True
                log.info("step %d of %s %s: waiting", step, self._url, found)
            time.sleep(_LOOK_S)

    def _try(self, ours: Reservation) -> bool | str:
        """Whether it was free, or taken over, or what is in the way."""
        key, data = self._key(ours.step), msgspec.json.encode(ours)
        for _ in range(_TRIES):
            if self._objects.create(key, data):
                return True
            found = self.look(ours.step)
            if found is None:
                continue  # released just now
            holder, about = found
            # A saver that was killed goes on with its run, and is the only one that does.
            goes_on = holder.run == ours.run and ours.purpose == "commit" == holder.purpose
            if not goes_on and not self.is_free(holder, about.modified_s):
                return (
                    f"is reserved by another saver (run {holder.run}, process {holder.process.pid}, {holder.purpose}); "
                    f"if that is dead, it is free at most {holder.lease_s + _MARGIN_S:g} s after it began"
                )
            if self._objects.replace(key, data, about):
                return False
        return f"is taken and free in turns: others want it too, or the store at {self._url} is not consistent"

    def release(self, held: Held) -> None:
        if held.expired:  # it may be another's by now
            found = self.look(held.reservation.step)
            if found is None or found[0].nonce != held.reservation.nonce:
                return
        self._objects.remove([self._key(held.reservation.step)])

    def look(self, step: int) -> tuple[Reservation, Object] | None:
        """The reservation of a step, and when it was made by the store's clock."""
        try:
            data, about = self._objects.fetch(self._key(step), _MAX_BYTES)
        except FileNotFoundError:
            return None
        try:
            return msgspec.json.decode(data, type=Reservation), about
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self._url / FOLDER}/{checkpoint_name(step)} was not made by async_ckpt "
                                  f"({error}): remove it") from error  # fmt: skip

    def steps(self) -> list[int]:
        """Of which there are reservations."""
        _, objects = self._objects.names(f"{self._prefix}{FOLDER}")
        return sorted(step for step in map(parse_step, objects) if step is not None)

    def is_free(self, holder: Reservation, made_s: float) -> bool:
        """Whether nobody works under it any more."""
        if holder.host == _host() and _is_dead(holder.process):
            return True
        return self.now_s() - made_s > holder.lease_s + _MARGIN_S

    def now_s(self) -> float:
        """By the store's clock; also proves that objects can be made there, seen, and removed."""
        key = f"{self._prefix}{FOLDER}/probe-{new_nonce()}"
        self._objects.write(key, b"made and removed by async_ckpt to see whether that works")
        try:
            found = self._objects.stat(key)
        finally:
            self._objects.remove([key])
        if found is None:
            raise CheckpointError(f"{self._url}: an object that was just written is not there: the store is not "
                                  f"consistent, which checkpoints need")  # fmt: skip
        return found.modified_s

    def old_probes(self) -> Iterator[str]:
        """Keys that a killed saver left."""
        _, objects = self._objects.names(f"{self._prefix}{FOLDER}")
        probes = {name: each.modified_s for name, each in objects.items() if name.startswith("probe-")}
        if probes:
            now_s = self.now_s()
            yield from (f"{self._prefix}{FOLDER}/{name}" for name, made_s in probes.items()
                        if now_s - made_s > _MARGIN_S)  # fmt: skip

    @property
    def _prefix(self) -> str:
        return f"{self._url.key}/" if self._url.key else ""

    def _key(self, step: int) -> str:
        return f"{self._prefix}{FOLDER}/{checkpoint_name(step)}"


def _host() -> str:
    """This boot of this machine, in this container."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:MAX_NAME_CHARS]


def _is_dead(process: Process) -> bool:
    """False where it cannot be told: in another pid namespace numbers mean other processes."""
    if process.pid_namespace != os.readlink("/proc/self/ns/pid"):
        return False
    try:
        return process_of(process.pid).start_ticks != process.start_ticks
    except OSError:
        return True
