"""A run in a relay's shared memory: as it is made, with what its ranks own and room for what it keeps for the lead, and
what its journal says of outcomes."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import check_path
from async_ckpt.core.protocol import Granted, Lead, Process, Settled
from async_ckpt.core.slots import Peer, RunRecord

from ..image import RunImage
from ..services import Services
from .copies import require_room
from .link_words import Opened, Share
from .spans import unpack


def create_relay_image(
    services: Services, lead: Lead, opened: Opened, members: list[tuple[Share, Process]]
) -> RunImage:
    """Blocks. Raises CheckpointError if shared memory cannot hold it, or if this saver is to write where it may not;
    then nothing is left of it."""
    shares = [share for share, _ in members]
    record = RunRecord(
        job=opened.job,
        options=opened.options,
        files=[file.path for file in opened.layout.files],
        peers=[Peer(share.rank, share.identity, process) for share, process in members],
        launcher=None,
        versions=opened.versions,
        lead=lead,
        hosts_write=opened.hosts_write,
    )
    if opened.hosts_write and not services.roots.covers(record.options.directory):
        raise CheckpointError(f"{record.options.directory} is outside the root {services.roots} of the saver of "
                              f"{socket.gethostname()}, which was started with --shared-fs direct: give it another "
                              f"--root, or leave that out")  # fmt: skip
    for path in (file.path for file in opened.layout.files):
        check_path(path)
    sizes_bytes = [file.total_bytes for file in opened.layout.files]
    spans = {share.rank: unpack(share.spans, sizes_bytes) for share in shares}
    image = RunImage.create(services.endpoint, record, opened.layout, spans)
    if opened.keeps:
        held = services.copies.held(record.options.directory)
        try:
            require_room(opened.layout, held.allocated_bytes() if held is not None else 0)
        except (CheckpointError, OSError):
            image.remove()
            raise
    return image


def note_settled(image: RunImage, slot: int, outcomes: Mapping[int, Settled]) -> None:
    """In the journal: up to which step all that was put into `slot` is settled, as far as `outcomes` tells. One that
    was skipped because the slot still holds an earlier one does not count before that one does."""
    if slot >= len(image.states):
        return
    told = image.states[slot].settled_step
    held = [cell.step for peer in image.record.peers for cell in image.staged_cells(peer.rank)
            if cell.slot == slot and cell.step > told and cell.step not in outcomes]  # fmt: skip
    steps = [each.step for each in outcomes.values() if each.slot == slot]
    image.settle(slot, max((step for step in steps if not held or step < min(held)), default=-1))


def grants_of(image: RunImage, shares: list[Share]) -> dict[int, Granted]:
    """By rank."""
    run, images = str(image.path), [str(slot.image) for slot in image.slots]
    return {
        share.rank: Granted(run=run, slot_directories=images, owned=share.owned, replicated=share.replicated)
        for share in shares
    }
