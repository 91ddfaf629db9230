"""What the messages of `protocol` are made of: processes, claims, layouts, options."""

from __future__ import annotations

from typing import Annotated

import msgspec

from .limits import (
    KEY_CHARS,
    MAX_ADDRESS_CHARS,
    MAX_CLAIMS,
    MAX_DIRECTORY_CHARS,
    MAX_NAME_CHARS,
    MAX_PID,
    MAX_TIMEOUT_S,
)
from .region import Region
from .retention_policy import Policy

# Checked while a message is decoded, so nothing beyond them is ever acted on.
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
Address = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ADDRESS_CHARS)]
Key = Annotated[bytes, msgspec.Meta(max_length=KEY_CHARS)]


class Process(msgspec.Struct, frozen=True):
    """A process that can be watched: pid numbers are reused and differ between pid namespaces."""

    pid: Annotated[int, msgspec.Meta(ge=1, le=MAX_PID)]
    start_ticks: Annotated[int, msgspec.Meta(ge=0)]
    pid_namespace: Name


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """ "I hold `region` of tensor number `tensor` (in the file's order) of image file number `file`."""

    file: int
    tensor: int
    region: Region


class Claims(msgspec.Struct, frozen=True, array_like=True):
    """All that a rank holds, as `claims.pack_claims` makes it: runs of elements on the line of all tensors, ascending,
    as int64; then `boxes`, which are no runs. They are numbered in this order."""

    starts: Annotated[bytes, msgspec.Meta(max_length=8 * MAX_CLAIMS)]
    lengths: Annotated[bytes, msgspec.Meta(max_length=8 * MAX_CLAIMS)]
    boxes: Annotated[list[Claim], msgspec.Meta(max_length=MAX_CLAIMS)]


class ImageFile(msgspec.Struct, frozen=True):
    """One file of the checkpoint directory to come: its first bytes and its whole length."""

    path: str
    header: bytes
    total_bytes: int


class Layout(msgspec.Struct, frozen=True):
    """The checkpoint directory to come: files that each save fills anew, documents that are the same in every save."""

    files: tuple[ImageFile, ...]
    documents: dict[str, bytes]


class Options(msgspec.Struct, frozen=True):
    """What all ranks of a run must agree on, layout aside. `upload_to`: the second tier, "" for none. `replicas`: how
    many hosts besides the lead's keep a whole copy of the newest committed checkpoint in RAM."""

    directory: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_DIRECTORY_CHARS)]
    world: int
    slots: int
    policy: Policy
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_TIMEOUT_S)]
    verify_replicas: bool = False
    preemption: bool = False
    upload_to: Annotated[str, msgspec.Meta(max_length=MAX_DIRECTORY_CHARS)] = ""
    replicas: Annotated[int, msgspec.Meta(ge=0, le=1)] = 0


class Lead(msgspec.Struct, frozen=True):
    """The saver that commits, where it is on another host: the address of its link ("tcp://10.0.0.1:40001"), its public
    CURVE key, and the pair by which the saver of this rank's own host gets in there; all in Z85. Three empty keys: a
    link without CURVE."""

    endpoint: Address
    server_key: Key
    public_key: Key
    secret_key: Key

    def __post_init__(self) -> None:
        lengths = {len(self.server_key), len(self.public_key), len(self.secret_key)}
        if lengths not in ({0}, {KEY_CHARS}):
            raise ValueError(f"a link has three keys of {KEY_CHARS} characters, or none")

    def __repr__(self) -> str:  # neither a log nor a traceback may tell the secret
        return f"Lead(endpoint={self.endpoint!r}, server_key={self.server_key!r}, public_key={self.public_key!r})"
