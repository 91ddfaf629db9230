"""Slots: checkpoint directories in shared memory, and the journal beside each that tells what is in it.

    /dev/shm/async-ckpt-<uid>/<run>/
        run.msgpack             RunRecord: all that a restarted saver needs to go on
        slot-0/                 the image: the files of the checkpoint to come, in their final layout
        slot-0.state            one cell a rank (`StateFile`)
        slot-0.record-0         rank 0's `SaveRecord` of the step that is in the slot; other ranks' if they have one
        layout.msgpack, share-1  of a run on several hosts: the bytes that rank 1, on another host, owns
    /dev/shm/async-ckpt-<uid>/links-<key>      how a saver listens for those of other hosts
    /dev/shm/async-ckpt-<uid>/uploads-<key>-... a directory whose uploads to a second tier are not done
    /dev/shm/async-ckpt-<uid>/copy-<key>-.../  a whole checkpoint that a saver keeps for other hosts

A rank writes only its own cell, and only in the order WRITING -> copy -> STAGED, so a slot whose cells all say STAGED
with one step holds that step whole, whoever is still alive to say so. Where hosts write their parts of a checkpoint
themselves it holds the part of this host, and those of the others are in theirs: its state file has another beginning,
so that nobody takes holes for zeros.

We map plain files instead of `multiprocessing.shared_memory`, whose resource tracker deletes live segments when an
unrelated process exits.
"""

from __future__ import annotations

import enum
import errno
import hashlib
import mmap
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import xxhash

from .errors import CheckpointError
from .limits import MAX_JOURNAL_BYTES, MAX_RECORD_BYTES
from .private import private_directory, read_capped, write_private
from .protocol import Lead, Options, Process, SaveRecord, Started, decode_stored

SHM = Path("/dev/shm")
_CELL = struct.Struct("<QqdQ")  # phase, step, copy_s, xxh64 of the three
_PHASE_AND_STEP = struct.Struct("<Qq")
_CELL_BYTES = 64  # a cache line a rank: neighbours do not slow each other down
_HEADER = struct.Struct("<8sQq")  # magic, world, the step up to which all outcomes of this slot were told
_MAGIC = b"ackptst1"
_MAGIC_OF_A_PART = b"ackptst2"
MORE_SPACE = (
    "Raise it: `docker run --shm-size=...`, in Kubernetes an emptyDir with medium: Memory on /dev/shm, elsewhere "
    "`mount -o remount,size=... /dev/shm`"
)


class Phase(enum.IntEnum):
    EMPTY = 0
    WRITING = 1
    STAGED = 2


_PHASES = tuple(Phase)  # to call an enum takes as long as all else that is done for a cell
_STAGED = int(Phase.STAGED)


class Cell(msgspec.Struct, frozen=True):
    phase: Phase
    step: int
    copy_s: float


_EMPTY = Cell(Phase.EMPTY, -1, 0.0)


class Peer(msgspec.Struct, frozen=True):
    """One rank of a run as the journal knows it."""

    rank: int
    identity: bytes
    process: Process


class RunRecord(msgspec.Struct, frozen=True):
    """The journal of one run: enough for a new saver to commit what is staged and to go on with the living ranks.

    `started` is what the ranks were told when all of them were ready; None until then. `peers` are the ranks whose
    saver keeps this journal: of a run on several hosts the lead's has all, a relay's those of its host, and `lead`.
    `trace`: as in `Register`. `hosts_write`: each host writes its part of a checkpoint itself, and has only that in its
    image; `not_direct` says why not, where the saver was asked to have it so.
    """

    job: str
    options: Options
    files: list[str]
    peers: list[Peer]
    launcher: Process | None
    versions: dict[str, str]
    started: Started | None = None
    lead: Lead | None = None
    trace: bool = False
    hosts_write: bool = False
    not_direct: str = ""


def shm_root() -> Path:
    return private_directory(SHM / f"async-ckpt-{os.getuid()}")


def shm_identity() -> str:
    """Equal for two processes if and only if they see the same /dev/shm: that of one host, and of containers that
    share it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # some sandboxes have none: then the device has to do
        boot = ""
    device = f"{SHM.stat().st_dev:x}" if SHM.exists() else "none"
    return f"{boot}:{device}"


class StateFile:
    """The cells of one slot, mapped. Each process writes at most the cell of its own rank."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes < _HEADER.size:
                raise CheckpointError(f"{path} is no slot state file: it has {size_bytes} bytes")
            self._map = mmap.mmap(file.fileno(), 0)
        magic, world, _ = _HEADER.unpack_from(self._map)
        if magic not in (_MAGIC, _MAGIC_OF_A_PART) or len(self._map) != (world + 1) * _CELL_BYTES:
            raise CheckpointError(f"{path} is no slot state file: begins with {magic!r}, {len(self._map)} bytes")
        self.world: int = world
        self._magic: bytes = magic

    @staticmethod
    def create(path: Path, world: int, *, part: bool = False) -> None:
        """`part`: the image is that of one host, of several that write what they have themselves."""
        with path.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            os.posix_fallocate(file.fileno(), 0, (world + 1) * _CELL_BYTES)
            file.write(_HEADER.pack(_MAGIC_OF_A_PART if part else _MAGIC, world, -1))

    def mark(self, rank: int, phase: Phase, step: int, copy_s: float = 0.0) -> None:
        body = _CELL.pack(phase, step, copy_s, 0)[:-8]
        check = xxhash.xxh64_intdigest(body)
        _CELL.pack_into(self._map, (rank + 1) * _CELL_BYTES, phase, step, copy_s, check)

    def cell(self, rank: int) -> Cell:
        """A cell torn by a kill in the middle of `mark` reads as EMPTY: its checksum fails."""
        offset = (rank + 1) * _CELL_BYTES
        phase, step, copy_s, check = _CELL.unpack_from(self._map, offset)
        if check != xxhash.xxh64_intdigest(self._map[offset : offset + _CELL.size - 8]) or phase > Phase.STAGED:
            return _EMPTY
        return Cell(_PHASES[phase], step, copy_s)

    def perhaps_staged(self, rank: int) -> int:
        """The step that `rank` has staged here, if its cell is whole; -1 for none. Unlike `cell` it believes what it
        reads, at a tenth of the time."""
        phase, step = _PHASE_AND_STEP.unpack_from(self._map, (rank + 1) * _CELL_BYTES)
        return step if phase == _STAGED else -1

    @property
    def settled_step(self) -> int:
        """Every step up to here that was in this slot is settled, -1 before any: the slot may be taken since then."""
        return int(_HEADER.unpack_from(self._map)[2])

    def settle(self, step: int) -> None:
        """Said by the saver alone, before any rank hears of the outcome."""
        _HEADER.pack_into(self._map, 0, self._magic, self.world, max(step, self.settled_step))

    def complete_step(self) -> int | None:
        """The step that every rank has staged, here or on its host, or None."""
        first = self.cell(0)
        cells = (self.cell(rank) for rank in range(self.world))
        whole = all(cell.phase is Phase.STAGED and cell.step == first.step for cell in cells)
        return first.step if whole else None

    def whole_step(self) -> int | None:
        """The step that lies here with every byte, or None."""
        return self.complete_step() if self._magic == _MAGIC else None

    def close(self) -> None:
        self._map.close()


class SlotPaths:
    """The names of one slot."""

    def __init__(self, run: Path, index: int) -> None:
        self._run = run
        self._name = f"slot-{index}"
        self.image = run / self._name
        self.state = run / f"{self._name}.state"

    def record(self, rank: int) -> Path:
        return self._run / self.record_name(rank)

    def record_name(self, rank: int) -> str:
        return f"{self._name}.record-{rank}"

    def write_record(self, rank: int, record: SaveRecord) -> None:
        """Replace the rank's record in one step, so that a kill leaves the old one or the new one.

        It is as large as the save's documents, which nobody knows at attach, so its space cannot be reserved like the
        image's. Raises CheckpointError if shared memory is full, or if the run was removed from it.
        """
        path = self.record(rank)
        data = msgspec.msgpack.encode(record)
        if len(data) > MAX_RECORD_BYTES:
            raise CheckpointError(f"the state of rank {rank} besides tensors has {len(data)} bytes, at most "
                                  f"{MAX_RECORD_BYTES} are allowed: keep large data in tensors")  # fmt: skip
        replace_file(path, data)

    def read_record(self, rank: int) -> SaveRecord:
        """Raises CheckpointError if the record is missing, damaged, or larger than any that `write_record` writes."""
        path = self.record(rank)
        try:
            return decode_stored(read_capped(path, MAX_RECORD_BYTES), SaveRecord)
        except (OSError, msgspec.DecodeError) as error:
            raise CheckpointError(f"the record {path} cannot be read: {error}") from error

    def records(self, world: int, step: int) -> list[tuple[int, SaveRecord]]:
        """Rank 0's record of `step`, then those of the other ranks that wrote one for it, each with its rank.

        Raises CheckpointError if rank 0's is missing, damaged, or of another step.
        """
        first = self.read_record(0)
        if first.step != step:
            raise CheckpointError(f"{self.record(0)} belongs to step {first.step}, expected {step}")
        there = set(os.listdir(self._run))  # asked once: most ranks write none
        names = ((rank, self.record_name(rank)) for rank in range(1, world))
        others = [(rank, self.read_record(rank)) for rank, name in names if name in there]
        return [(0, first), *((rank, record) for rank, record in others if record.step == step)]

    def remove(self) -> None:
        shutil.rmtree(self.image, ignore_errors=True)
        for path in self._run.glob(f"{self._name}.*"):
            path.unlink(missing_ok=True)


def write_journal(run: Path, record: RunRecord) -> None:
    """Raises CheckpointError if shared memory is full; then the journal is as it was."""
    replace_file(run / "run.msgpack", msgspec.msgpack.encode(record))


def replace_file(path: Path, content: bytes) -> None:
    """In one step: a kill leaves the old one or the new one. Raises CheckpointError if shared memory is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_private(temporary, content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            info = os.statvfs(SHM)
            raise CheckpointError(
                f"/dev/shm is full: {info.f_bavail * info.f_frsize} bytes available, {path} needs {len(content)}. "
                f"Free some there, or raise its size. {MORE_SPACE}"
            ) from error
        if error.errno == errno.ENOENT:
            raise CheckpointError(
                f"somebody removed {path.parent} from shared memory (systemd does so when a user logs out: set "
                f"RemoveIPC=no): attach again"
            ) from error
        raise


def new_run_path(endpoint: str) -> Path:
    return shm_root() / f"{endpoint_key(endpoint)}-{secrets.token_hex(8)}"


def read_journals(endpoint: str) -> Iterator[tuple[Path, RunRecord]]:
    """The runs that a saver of `endpoint` left in shared memory. A run killed before it had a journal is removed; what
    another user owns is not ours to believe or to remove."""
    for run in sorted(shm_root().glob(f"{endpoint_key(endpoint)}-*")):
        try:
            info = run.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
                continue
            yield run, decode_stored(read_capped(run / "run.msgpack", MAX_JOURNAL_BYTES), RunRecord)
        except (OSError, msgspec.DecodeError):
            remove_run(run)


def links_path(endpoint: str) -> Path:
    """Where a saver of `endpoint` notes how it listens for savers of other hosts, with its keys."""
    return shm_root() / f"links-{endpoint_key(endpoint)}"


def new_copy_path(endpoint: str) -> Path:
    """Where a saver of `endpoint` keeps a whole checkpoint that another host's saver committed."""
    return shm_root() / f"copy-{endpoint_key(endpoint)}-{secrets.token_hex(8)}"


def copy_paths(endpoint: str) -> list[Path]:
    """Those that are there, whole or not; what another user owns is none."""
    found = []
    for path in sorted(shm_root().glob(f"copy-{endpoint_key(endpoint)}-*")):
        info = path.lstat()
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid():
            found.append(path)
    return found


def endpoint_key(endpoint: str) -> str:
    """Names in shared memory that belong to the savers of `endpoint` have it."""
    return hashlib.sha256(endpoint.encode()).hexdigest()[:12]


def remove_run(run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
