"""What the parts of a saver need from the process around them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from async_ckpt.core.protocol import FromSaver, Lead, Options, Rejected

from .clock import RunningClock
from .rejections import Cause, Rejections
from .roots import Roots
from .status import ENDED_RUNS, HostStatus, RunStatus, SaveStatus
from .upload_status import UploadedStep

if TYPE_CHECKING:
    from .hosts.copy_keeper import CopyKeeper, Way
    from .hosts.dialler import Link, LinkEvents
    from .hosts.part_commit import PartCommits
    from .hosts.spreading import Spreading
    from .hosts.who_writes import Relay
    from .storage import Storage
    from .unfinished import Unfinished

T = TypeVar("T")


class _Threads:
    """Of one directory: for a commit, the retention after the one before it, jobs that attach. More work waits."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="storage")
        self.used = 0


@dataclass
class Services:
    """`send(identity, message)` never blocks. `root`, one directory or several places, bounds every write to storage.
    `incarnation` is new with every start of the saver on `endpoint`. Storage is touched in threads only, so a stuck
    disk stops no message; each directory has threads of its own (`threads`), so it stops no other directory either.

    `relayed_bytes` came from savers of other hosts. `dial` makes a way to a lead, for ranks whose job has it elsewhere.

    `ended` are the last runs that are over. `on_settled` is told of each save that has its outcome, `on_uploaded` of
    each upload to a second tier; `unfinished` notes those that outlive their run, where another saver follows a killed
    one by itself. `way_of` leads to the relay that speaks for a rank; `copies` are whole checkpoints in
    RAM that other hosts have committed, `spreading` brings them there.

    `lease_s`: after how long a silent rank that cannot be watched counts as dead. `keep_image_s`: how long the newest
    image of a dead run stays in RAM for its successor; `orphan_image_s` where nobody is left to start one. `direct`:
    this saver was told that hosts may write their parts of a checkpoint themselves; `parts` are those that are being
    written for its commits, `relays_of` tells which relays speak for which ranks.
    """

    endpoint: str
    root: Path | Roots
    incarnation: str
    send: Callable[[bytes, FromSaver], None]
    loop: asyncio.AbstractEventLoop
    lease_s: float = 30.0
    keep_image_s: float = 900.0
    orphan_image_s: float = 20.0
    direct: bool = False
    rejections: Rejections = field(default_factory=Rejections)
    ended: deque[RunStatus] = field(default_factory=lambda: deque(maxlen=ENDED_RUNS))
    on_settled: Callable[[SaveStatus], None] | None = None
    on_uploaded: Callable[[UploadedStep], None] = lambda upload: None
    unfinished: Unfinished | None = None
    relayed_bytes: int = 0
    dial: Callable[[Lead, LinkEvents], Link] | None = None
    hosts: Callable[[], list[HostStatus]] = list
    way_of: Callable[[bytes], Way | None] = lambda identity: None
    relays_of: Callable[[Iterable[bytes]], Mapping[bytes, Relay]] = lambda identities: {}
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    threads: dict[str, _Threads] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=4, thread_name_prefix="work")
    )
    _far_pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=16, thread_name_prefix="far")
    )
    # Its own: a store that does not answer keeps neither commits to another store waiting, nor the end of the saver.
    _upload_pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=4, thread_name_prefix="upload")
    )

    def __post_init__(self) -> None:
        self.roots = self.root if isinstance(self.root, Roots) else Roots([self.root])
        self.clock = RunningClock(self.loop.time)
        self.started_s = self.loop.time()

    @cached_property
    def copies(self) -> CopyKeeper:
        from .hosts.copy_keeper import CopyKeeper  # its words take time and memory, and few savers know other hosts

        return CopyKeeper(self)

    @cached_property
    def spreading(self) -> Spreading:
        from .hosts.spreading import Spreading

        return Spreading(self, self.copies)

    @cached_property
    def parts(self) -> PartCommits:
        from .hosts.part_commit import PartCommits

        return PartCommits(self)

    @property
    def parts_if_any(self) -> PartCommits | None:
        """None as long as no run is there of which every host writes its part."""
        parts: PartCommits | None = vars(self).get("parts")
        return parts

    @property
    def copies_if_any(self) -> CopyKeeper | None:
        """None as long as nobody has asked for `copies`: there are none."""
        copies: CopyKeeper | None = vars(self).get("copies")
        return copies

    def copied(self, options: Options) -> bool:
        """Other hosts keep checkpoints of such a run in RAM, or may keep one of the job before it."""
        return options.replicas > 0 or self.copies_if_any is not None

    def now_s(self) -> float:
        return self.clock.now_s()

    def storage(self, directory: str) -> Storage:
        """Where the checkpoints of `directory` rest; nothing is done there yet. Raises CheckpointError if it is outside
        every root."""
        return self.roots.storage(directory)

    def reject(self, identity: bytes, cause: Cause, reason: str) -> None:
        """Count what `identity` sent, and tell it: what it sent has changed nothing."""
        self.rejections.count(cause, reason)
        self.send(identity, Rejected(reason=reason))

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def in_thread(self, work: Callable[[], T], at: Storage | None = None) -> T:
        """`at`: what it waits for, and that may never answer. A directory of this host has threads of its own while
        there is work on it; what waits for a network shares some, and so does what only computes."""
        if at is None:
            return await self.loop.run_in_executor(self._pool, work)
        if at.far:
            return await self.loop.run_in_executor(self._far_pool, work)
        threads = self.threads.setdefault(at.directory, _Threads())
        threads.used += 1
        try:
            return await self.loop.run_in_executor(threads.pool, work)
        finally:
            threads.used -= 1
            if not threads.used and self.threads.pop(at.directory, None) is not None:
                threads.pool.shutdown(wait=False)

    async def in_upload_thread(self, work: Callable[[], T]) -> T:
        return await self.loop.run_in_executor(self._upload_pool, work)

    async def drain(self) -> None:
        """Wait for everything spawned, and for what that spawns."""
        while self.tasks:
            await asyncio.wait(set(self.tasks))
        self._pool.shutdown()
        self._upload_pool.shutdown(wait=False)
        self._far_pool.shutdown()
