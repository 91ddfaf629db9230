"""The newest image of a run whose ranks are gone, for the job that comes back."""

from __future__ import annotations

import logging
from pathlib import Path

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import location_of
from async_ckpt.core.manifest import MANIFEST_NAME, decode_manifest, manifest_bytes
from async_ckpt.core.private import write_private
from async_ckpt.core.slots import SlotPaths

from .image import RunImage

log = logging.getLogger(__name__)


def kept_image(image: RunImage, step: int, path: str, *, whole: bool) -> str | None:
    """The slot that holds `step`, committed at `path`, if it is the newest one. `whole`: make it a checkpoint by
    itself, with documents and manifest, so that nothing of it has to be read from storage; where that fails it stays
    what it is. Blocks."""
    try:
        newest = image.newest_image()
    except ValueError:  # its lease ended just now: it is on disk all the same
        return None
    if newest is None or newest[0] != step:
        return None
    if whole:
        try:
            _complete(image, newest[1], step, path)
        except (OSError, CheckpointError) as error:
            log.warning("the image of step %d in RAM does without its documents: %s", step, error)
    return str(newest[1].image)


def _complete(image: RunImage, slot: SlotPaths, step: int, path: str) -> None:
    """The manifest comes last: with it every other file is there."""
    data = manifest_bytes(location_of(path) / MANIFEST_NAME)
    manifest = decode_manifest(data)
    if manifest.run != image.path.name:
        raise CheckpointError(f"{path} was committed by run {manifest.run}")
    documents = {
        name: content
        for _, record in slot.records(image.record.options.world, step)
        for name, content in record.documents.items()
    }
    for name, entry in manifest.files.items():
        place = Path(slot.image, name)
        if name in documents:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(place, documents[name])
        if place.stat().st_size != entry.bytes:
            raise CheckpointError(f"{place} has another size than in {path}")
    write_private(slot.image / MANIFEST_NAME, data)
