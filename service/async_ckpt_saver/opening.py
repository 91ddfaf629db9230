"""What a granted registration becomes: the journal of a run, and what ranks of other hosts own of it. Pure."""

from __future__ import annotations

from async_ckpt.core.slots import Peer, RunRecord

from .hosts.shares import host_of
from .hosts.spans import Span, spans_of
from .registration import Grant, Registration, check_layout


def record_of(registration: Registration, grant: Grant) -> RunRecord:
    first = registration.members[0]
    peers = [
        Peer(rank, registration.identities[rank], registration.members[rank].process)
        for rank in range(registration.options.world)
    ]
    files = [*(file.path for file in grant.layout.files), *grant.layout.documents]
    return RunRecord(
        registration.job, registration.options, files, peers, first.launcher, first.versions, trace=first.trace
    )


def remote_shares(registration: Registration, grant: Grant) -> dict[int, list[Span]]:
    """The bytes of each rank that is on another host."""
    remote = {rank: each for rank, each in registration.members.items() if host_of(each.process) is not None}
    files = check_layout(grant.layout) if remote else []
    return {rank: spans_of(files, each.claims, grant.ownership.owned[rank]) for rank, each in remote.items()}
