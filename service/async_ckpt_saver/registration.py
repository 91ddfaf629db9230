"""The gathering of one run's ranks: everybody is granted the run, or everybody is refused with one reason. Pure."""

from __future__ import annotations

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import FileLayout, TensorSpec, parse_file
from async_ckpt.core.limits import MAX_FILES, MAX_SLOTS, MAX_TENSORS, MAX_WORLD
from async_ckpt.core.manifest import check_path
from async_ckpt.core.protocol import PROTOCOL, Layout, Options, Register

from .coverage import Ownership, assign_owners


class Grant(msgspec.Struct, frozen=True):
    """The layout of the run, and who writes what."""

    layout: Layout
    ownership: Ownership


class Want(msgspec.Struct, frozen=True):
    """The layout of `rank` is needed to name the difference."""

    rank: int


class Complete(msgspec.Struct, frozen=True):
    """Every rank is here: ask `conclude`, which takes time that grows with ranks and tensors."""


class Refusal(msgspec.Struct, frozen=True):
    reason: str


Verdict = Grant | Want | Complete | Refusal | None


class Registration:
    """Collects one `Register` a rank. `None` as a verdict means: wait for more."""

    def __init__(self, options: Options, job: str, now_s: float) -> None:
        self.options = options
        self.job = job
        self.since_s = now_s
        self.members: dict[int, Register] = {}
        self.identities: dict[int, bytes] = {}
        self._wanted: set[int] = set()
        self._ranks: dict[bytes, int] = {}

    def add(self, identity: bytes, message: Register) -> Verdict:
        self.identities[message.rank] = identity  # before any refusal, which must reach this rank too
        self._ranks[identity] = message.rank
        reason = _unacceptable(message) or self._differing_option(message)
        if reason:
            return Refusal(reason)
        self.members[message.rank] = message
        if len(self.members) < self.options.world:
            return None
        return Complete()

    def want_layout(self, rank: int) -> None:
        self._wanted.add(rank)

    def wants_layout(self, rank: int) -> bool:
        """Whether `rank` was asked for its layout and has not answered yet."""
        return rank in self._wanted

    def add_layout(self, rank: int, layout: Layout) -> Verdict:
        """Why the layout of `rank` hashes differently from rank 0's."""
        self._wanted.discard(rank)
        expected = self.members[0].layout if 0 in self.members else None
        if expected is None:
            return None
        try:
            return Refusal(_difference(rank, layout, expected))
        except CheckpointError as error:
            return Refusal(f"the layout of rank {rank}: {error}")

    def rank_of(self, identity: bytes) -> int | None:
        return self._ranks.get(identity)

    def expire(self, now_s: float) -> Refusal | None:
        if now_s - self.since_s < self.options.timeout_s:
            return None
        missing = [rank for rank in range(self.options.world) if rank not in self.members]
        names = ", ".join(str(rank) for rank in missing[:8]) + (", ..." if len(missing) > 8 else "")
        return Refusal(
            f"rank {names} of {self.options.world} did not attach within {self.options.timeout_s:g} s: every rank must "
            f"call async_ckpt.attach with the same directory ({self.options.directory}); see what that rank is doing, "
            f"or raise timeout_s"
        )

    def _differing_option(self, message: Register) -> str | None:
        for field in Options.__struct_fields__:
            mine, theirs = getattr(self.options, field), getattr(message.options, field)
            if mine != theirs:
                return (f"rank {message.rank} attached with {field}={theirs!r}, an earlier rank with {field}={mine!r}: "
                        f"they must agree")  # fmt: skip
        return None

    def conclude(self) -> Verdict:
        """A Grant, a Refusal, or a Want. Changes nothing, so it may run in a thread."""
        layout = self.members[0].layout
        if layout is None:
            return Refusal("rank 0 registered without a layout")
        for rank, member in sorted(self.members.items()):
            if member.layout_hash != self.members[0].layout_hash:
                return Want(rank)
        try:
            files = check_layout(layout)
            claims = {rank: member.claims for rank, member in self.members.items()}
            ownership = assign_owners(files, claims)
        except CheckpointError as error:
            return Refusal(str(error))
        return Grant(layout, ownership)


def check_layout(layout: Layout) -> list[FileLayout]:
    """The layouts of the files. Raises CheckpointError if a path could leave the directory or a header is wrong."""
    paths = [file.path for file in layout.files] + list(layout.documents)
    if len(paths) > MAX_FILES:
        raise CheckpointError(f"the layout has {len(paths)} files, at most {MAX_FILES} are allowed")
    if len(set(paths)) != len(paths):
        raise CheckpointError(f"a path occurs twice in the layout: {sorted(paths)}")
    for path in paths:
        check_path(path)
    files = []
    for file in layout.files:
        parsed = parse_file(file.path, file.header)
        if parsed.total_bytes != file.total_bytes or len(parsed.header) != len(file.header):
            raise CheckpointError(f"{file.path} should have {parsed.total_bytes} bytes, not {file.total_bytes}")
        files.append(parsed)
    tensors = sum(len(file.extents) for file in files)
    if tensors > MAX_TENSORS:
        raise CheckpointError(f"the layout has {tensors} tensors, at most {MAX_TENSORS} are allowed")
    return files


def _unacceptable(message: Register) -> str | None:
    options = message.options
    if message.protocol != PROTOCOL:
        return (f"rank {message.rank} speaks protocol {message.protocol}, this saver {PROTOCOL}: "
                f"install the same async-ckpt version on both sides")  # fmt: skip
    if not 1 <= options.world <= MAX_WORLD or not 0 <= message.rank < options.world:
        return f"rank {message.rank} of {options.world} ranks; at most {MAX_WORLD} are allowed"
    if not 1 <= options.slots <= MAX_SLOTS:
        return f"slots={options.slots}; it must be between 1 and {MAX_SLOTS}"
    return None


def _difference(rank: int, layout: Layout, expected: Layout) -> str:
    mine, reference = _tensors(layout), _tensors(expected)
    advice = "build the same model with the same PEFT config on every rank"
    for key, spec in reference.items():
        if key not in mine:
            return f"rank {rank} has no tensor {spec.name!r}, which rank 0 has: {advice}"
        if mine[key] != spec:
            other = mine[key]
            return (f"tensor {spec.name!r} is {other.dtype} {list(other.shape)} on rank {rank}, but {spec.dtype} "
                    f"{list(spec.shape)} on rank 0: {advice}")  # fmt: skip
    for key, spec in mine.items():
        if key not in reference:
            return f"rank {rank} has a tensor {spec.name!r}, which rank 0 has not: {advice}"
    return f"the layouts of rank {rank} and rank 0 differ, though their tensors are the same: {advice}"


def _tensors(layout: Layout) -> dict[tuple[str, str], TensorSpec]:
    return {(file.path, extent.spec.name): extent.spec for file in check_layout(layout) for extent in file.extents}
