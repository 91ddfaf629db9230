"""What a granted registration becomes: the journal of a run, its image, and what ranks of other hosts own of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from async_ckpt.core.slots import Peer, RunRecord

from .hosts.shares import host_of
from .hosts.spans import Span, spans_of
from .hosts.who_writes import objection, too_many
from .image import RunImage
from .registration import Grant, Registration, check_layout

if TYPE_CHECKING:
    from .services import Services

log = logging.getLogger(__name__)


def record_of(services: Services, registration: Registration, grant: Grant) -> RunRecord:
    first = registration.members[0]
    peers = [
        Peer(rank, registration.identities[rank], registration.members[rank].process)
        for rank in range(registration.options.world)
    ]
    files = [*(file.path for file in grant.layout.files), *grant.layout.documents]
    remote = [registration.identities[rank] for rank in remote_hosts(registration)]
    wanted = services.direct and bool(remote)
    why_not = objection(registration.options, list(services.relays_of(remote).values())) if wanted else ""
    return RunRecord(
        registration.job,
        registration.options,
        files,
        peers,
        first.launcher,
        first.versions,
        trace=first.trace,
        hosts_write=wanted and not why_not,
        not_direct=why_not,
    )


def open_image(endpoint: str, record: RunRecord, grant: Grant, registration: Registration) -> RunImage:
    """Blocks. Raises CheckpointError."""
    shares = remote_shares(registration, grant)
    if record.hosts_write:
        sizes_bytes = [file.total_bytes for file in grant.layout.files]
        if why_not := too_many(sizes_bytes, shares, remote_hosts(registration)):
            record = msgspec.structs.replace(record, hosts_write=False, not_direct=why_not)
    if record.not_direct:
        log.warning("%s: the other hosts hand over to this one what they hold, in spite of --shared-fs direct: %s",
                    record.options.directory, record.not_direct)  # fmt: skip
    return RunImage.create(endpoint, record, grant.layout, shares)


def remote_hosts(registration: Registration) -> dict[int, str]:
    """Where each rank is that is on another host."""
    found = {rank: host_of(each.process) for rank, each in registration.members.items()}
    return {rank: host for rank, host in found.items() if host is not None}


def remote_shares(registration: Registration, grant: Grant) -> dict[int, list[Span]]:
    """The bytes of each rank that is on another host."""
    remote = {rank: registration.members[rank] for rank in remote_hosts(registration)}
    files = check_layout(grant.layout) if remote else []
    return {rank: spans_of(files, each.claims, grant.ownership.owned[rank]) for rank, each in remote.items()}
