"""What a saver can tell of itself: its runs, and the last saves of each on a time line.

`Chronicle` is the memory: pure, told of what happened by `LiveRun`, bounded. The structs are the report: what
`async-ckpt-saver status --json` prints.
"""

from __future__ import annotations

import errno
import os
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from async_ckpt.core.protocol import Failed, FromRank, Settled, Skipped, Staged

from .run import Action, Commit
from .upload_status import UploadStatus

if TYPE_CHECKING:
    from .image import RunImage

REMEMBERED_SAVES = 32
ENDED_RUNS = 16
_NEVER_S = -1.0

RunState = Literal["starting", "live", "kept", "ended", "relayed"]


class StagedBy(msgspec.Struct, frozen=True):
    """`copy_s` is the time of the rank's copy into the image, `stall_s` what the save has cost its training thread,
    `at_unix_s` when the saver heard of it."""

    rank: int
    at_unix_s: float
    copy_s: float
    stall_s: float


class SaveStatus(msgspec.Struct, frozen=True):
    """One save. It starts with the first rank's report, its write when all ranks have staged it; `settled_unix_s` is
    when it was committed, failed or was skipped. What has not happened is None. `cause` is one of a small set, for
    counting: "" if committed, see `Chronicle`."""

    step: int
    slot: int
    started_unix_s: float
    staged: list[StagedBy]
    write_started_unix_s: float | None
    settled_unix_s: float | None
    outcome: Literal["open", "committed", "skipped", "failed"]
    cause: str
    reason: str
    bytes: int
    write_s: float
    commit_s: float


class RankStatus(msgspec.Struct, frozen=True):
    """`silent_s`: since its last message; None if this saver has never heard it."""

    rank: int
    pid: int
    alive: bool
    silent_s: float | None


class SlotStatus(msgspec.Struct, frozen=True):
    """`phases` of the ranks' cells, in the order of ranks: "EMPTY", "WRITING" or "STAGED"; `step` if all staged it."""

    slot: int
    phases: list[str]
    step: int | None


class RunStatus(msgspec.Struct, frozen=True):
    """`failures` counts saves that were not committed, by cause. `queue` are the steps that are staged or being staged
    and not yet being written. `last_commit_step` and `last_commit_age_s` are None before the first commit that this
    saver made. `image_bytes` is the shared memory that the run holds. `hosts_write`: every host writes its part itself;
    `not_direct` says why not, where the saver was started with `--shared-fs direct`."""

    directory: str
    job: str
    run: str
    state: RunState
    world: int
    ranks: list[RankStatus]
    slots: list[SlotStatus]
    saves: list[SaveStatus]
    committed: int
    committed_bytes: int
    failures: dict[str, int]
    queue: list[int]
    last_error: str
    last_commit_step: int | None
    last_commit_age_s: float | None
    image_bytes: int
    hosts_write: bool = False
    not_direct: str = ""


class HostStatus(msgspec.Struct, frozen=True):
    """The saver of another host that relays to this one: its name, how many ranks it speaks for, the bytes it has
    handed over in its session, seconds since it was last heard, the newest step that it keeps a copy of."""

    name: str
    ranks: int
    relayed_bytes: int
    silent_s: float
    copy_step: int | None = None


class SaverStatus(msgspec.Struct, frozen=True):
    pid: int
    version: str
    endpoint: str
    root: str
    incarnation: str
    uptime_s: float
    rss_bytes: int
    rejected_messages: Mapping[str, int]
    now_unix_s: float
    runs: list[RunStatus]
    ended: list[RunStatus]
    relayed_bytes: int = 0
    hosts: list[HostStatus] = []
    uploads: list[UploadStatus] = []


class _Stagings:
    """When each of `world` ranks was heard to have staged a save, and what it said of it: 24 bytes a rank, for there
    may be thousands, and many saves are remembered. What is said first counts."""

    def __init__(self, world: int) -> None:
        self._at_s, self._copy_s, self._stall_s = (array("d", [_NEVER_S]) * world for _ in range(3))

    def add(self, rank: int, at_s: float, said: Staged) -> None:
        if self._at_s[rank] == _NEVER_S:
            self._at_s[rank], self._copy_s[rank], self._stall_s[rank] = at_s, said.copy_s, said.stall_s

    def __iter__(self) -> Iterator[tuple[int, float, float, float]]:
        """Rank, when, copy_s, stall_s; in the order of ranks."""
        columns = zip(self._at_s, self._copy_s, self._stall_s, strict=True)
        return ((rank, *said) for rank, said in enumerate(columns) if said[0] != _NEVER_S)


class _Save:
    def __init__(self, step: int, slot: int, started_s: float, world: int) -> None:
        self.step, self.slot, self.started_s = step, slot, started_s
        self.staged = _Stagings(world)
        self.write_started_s: float | None = None
        self.settled_s: float | None = None
        self.settled: Settled | None = None
        self.cause = ""


class Chronicle:
    """The last saves of one run of `world` ranks and counts of all of them; times are those of `now_s`, which is
    monotonic. `observer` gives who is to be told of each save that has its outcome, if anybody is now.

    Causes of what was not committed: "copy_failed" (a rank's copy), "slot_busy" (a rank skipped it), "incomplete" (a
    rank died, left, or went on without it), "enospc", "eio" and other names of errors of the system while it was
    written, "commit_failed" (anything else then).
    """

    def __init__(
        self,
        now_s: Callable[[], float],
        world: int,
        observer: Callable[[], Callable[[SaveStatus], None] | None] = lambda: None,
    ) -> None:
        self.now_s = now_s
        self._world = world
        self._observer = observer
        self._saves: OrderedDict[int, _Save] = OrderedDict()
        self._causes: dict[int, str] = {}
        self.heard_s: dict[int, float] = {}
        self.committed = 0
        self.committed_bytes = 0
        self.failures: Counter[str] = Counter()
        self.last_error = ""
        self.last_commit_s: float | None = None
        self.last_commit_step: int | None = None

    def heard(self, rank: int, message: FromRank) -> None:
        """A rank said something."""
        now_s = self.now_s()
        self.heard_s[rank] = now_s
        if not isinstance(message, (Staged, Skipped, Failed)):  # `|` makes a new object for each message
            return
        save = self._save(message.step, message.slot, now_s)
        if save.settled is not None:
            return  # said again
        if isinstance(message, Staged):
            save.staged.add(rank, now_s, message)
        else:
            self._causes.setdefault(message.step, "copy_failed" if isinstance(message, Failed) else "slot_busy")

    def note(self, action: Action) -> None:
        """What the state machine decided."""
        if isinstance(action, Commit):
            now_s = self.now_s()
            self._save(action.step, action.slot, now_s).write_started_s = now_s
        elif action.rank is None:
            self._settle(action.settled)
        elif (save := self._saves.get(action.settled.step)) is not None and save.settled is None:
            # Known from before this saver, or long forgotten: it is told again, and has not happened again.
            del self._saves[action.settled.step]
            self._causes.pop(action.settled.step, None)

    def commit_failed(self, step: int, error: BaseException) -> None:
        """Before the state machine is told."""
        code = getattr(error, "errno", None)
        self._causes[step] = errno.errorcode.get(code, "commit_failed").lower() if code is not None else "commit_failed"

    @property
    def saves(self) -> list[_Save]:
        """Oldest first."""
        return list(self._saves.values())

    def _save(self, step: int, slot: int, now_s: float) -> _Save:
        save = self._saves.get(step)
        if save is None:
            save = self._saves[step] = _Save(step, slot, now_s, self._world)
            while len(self._saves) > REMEMBERED_SAVES:
                forgotten, _ = self._saves.popitem(last=False)
                self._causes.pop(forgotten, None)
        return save

    def _settle(self, settled: Settled) -> None:
        cause = self._causes.pop(settled.step, "incomplete")
        now_s = self.now_s()
        save = self._save(settled.step, settled.slot, now_s)
        save.settled, save.settled_s = settled, now_s
        if settled.outcome == "committed":
            self.committed += 1
            self.committed_bytes += settled.bytes
            self.last_commit_s, self.last_commit_step = save.settled_s, settled.step
        else:
            save.cause = cause
            self.failures[cause] += 1
            self.last_error = f"step {settled.step} {settled.outcome}: {settled.reason}"
        observer = self._observer()
        if observer is not None:  # the report names every rank
            observer(_save_status(save, wall_clock_s() - now_s))


def encode_status(status: SaverStatus) -> bytes:
    return msgspec.json.encode(status)


def decode_status(report: bytes) -> SaverStatus:
    """Raises msgspec.DecodeError."""
    return msgspec.json.decode(report, type=SaverStatus)


def run_status(
    image: RunImage, chronicle: Chronicle, state: RunState, queue: list[int], gone: Callable[[int], bool]
) -> RunStatus:
    now_s = chronicle.now_s()
    to_unix_s = wall_clock_s() - now_s
    options = image.record.options
    return RunStatus(
        directory=options.directory,
        job=image.record.job,
        run=image.path.name,
        state=state,
        world=options.world,
        ranks=[
            RankStatus(
                peer.rank,
                peer.process.pid,
                not gone(peer.rank),
                now_s - chronicle.heard_s[peer.rank] if peer.rank in chronicle.heard_s else None,
            )
            for peer in image.record.peers
        ],
        slots=[_slot(index, image) for index in range(len(image.states))],
        saves=[_save_status(save, to_unix_s) for save in chronicle.saves],
        committed=chronicle.committed,
        committed_bytes=chronicle.committed_bytes,
        failures=dict(chronicle.failures),
        queue=queue,
        last_error=chronicle.last_error,
        last_commit_step=chronicle.last_commit_step,
        last_commit_age_s=None if chronicle.last_commit_s is None else now_s - chronicle.last_commit_s,
        image_bytes=image.allocated_bytes(),
        hosts_write=image.record.hosts_write,
        not_direct=image.record.not_direct,
    )


def wall_clock_s() -> float:
    """For people: it may jump, so nothing is decided by it."""
    return time.time()


def process_memory_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _slot(index: int, image: RunImage) -> SlotStatus:
    state = image.states[index]
    try:
        phases = [state.cell(rank).phase.name for rank in range(state.world)]
        return SlotStatus(index, phases, state.complete_step())
    except ValueError:  # the run has been removed from shared memory
        return SlotStatus(index, [], None)


def _save_status(save: _Save, to_unix_s: float) -> SaveStatus:
    def unix(at_s: float | None) -> float | None:
        return None if at_s is None else at_s + to_unix_s

    settled = save.settled
    return SaveStatus(
        step=save.step,
        slot=save.slot,
        started_unix_s=save.started_s + to_unix_s,
        staged=[StagedBy(rank, at_s + to_unix_s, copy_s, stall_s) for rank, at_s, copy_s, stall_s in save.staged],
        write_started_unix_s=unix(save.write_started_s),
        settled_unix_s=unix(save.settled_s),
        outcome="open" if settled is None else settled.outcome,
        cause=save.cause,
        reason="" if settled is None else settled.reason,
        bytes=0 if settled is None else settled.bytes,
        write_s=0.0 if settled is None else settled.write_s,
        commit_s=0.0 if settled is None else settled.commit_s,
    )
