"""A run in a relay's shared memory, as it is made: what its ranks own, and room for what it keeps for the lead."""

from __future__ import annotations

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.slots import RunRecord

from ..image import RunImage
from ..services import Services
from .copies import require_room
from .link_words import Opened, Share
from .spans import unpack


def create_relay_image(services: Services, record: RunRecord, opened: Opened, shares: list[Share]) -> RunImage:
    """Blocks. Raises CheckpointError if shared memory cannot hold it; then nothing is left of it."""
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
