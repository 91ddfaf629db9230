"""Where the bytes of a checkpoint are, in RAM or on disk, and reading them into the model."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.holding import reading
from async_ckpt.core.location import Location, location_of
from async_ckpt.core.manifest import (
    FORMAT,
    MANIFEST_NAME,
    Manifest,
    committed,
    parse_step,
    read_manifest,
)

from .mapped import Slot
from .opening import OpenCheckpoint
from .plan import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint: its committed directory, and its image in RAM if one is known."""

    path: Location
    image: Path | None

    @property
    def whole_in_ram(self) -> bool:
        """The image has all files of the checkpoint, its manifest too: nothing has to be read from `path`."""
        return self.image is not None and (self.image / MANIFEST_NAME).exists()


def find(checkpoint: str | int | os.PathLike[str], place_of: Callable[[int], Location], slots: Sequence[Slot]) -> Found:
    """The checkpoint of a step, or at a path. Raises CheckpointError if `checkpoint` is neither."""
    if isinstance(checkpoint, str | os.PathLike):
        return Found(location_of(checkpoint), None)
    try:
        step = operator.index(checkpoint)
    except TypeError as error:
        raise CheckpointError(f"restore({checkpoint!r}): give 'latest', a step, or a path") from error
    return Found(place_of(step), image_of(step, slots))


def image_of(step: int, slots: Sequence[Slot]) -> Path | None:
    """The slot of this run in which `step` lies whole."""
    return next((slot.paths.image for slot in slots if slot.state.whole_step() == step), None)


def read(plan: Plan, found: Found, slots: Sequence[Slot]) -> tuple[Manifest, Literal["ram", "disk"]]:
    """Read into everything that `plan` describes, from RAM where that is possible.

    From an image that is whole nothing else is read. The saver's retention leaves a checkpoint alone while it is read.
    Raises CheckpointError listing what does not fit; then nothing was changed.
    """
    if found.image is not None and found.whole_in_ram:
        try:
            description = describe(found.image)
            OpenCheckpoint(plan, found.image, found.image).read()
            return description, "ram"
        except CheckpointError as error:
            log.warning("the copy in RAM cannot be used (%s); reading %s", error, found.path)
    with reading(found.path):
        return _read(plan, found, slots)


def _read(plan: Plan, found: Found, slots: Sequence[Slot]) -> tuple[Manifest, Literal["ram", "disk"]]:
    description = describe(found.path)
    image = found.image
    if image is not None and image.exists():
        try:
            ours = next((slot for slot in slots if slot.paths.image == image), None)
            OpenCheckpoint(plan, found.path, image, ours).read()
            # A slot of this run may have been taken by another rank's next save while we read.
            if ours is None or image_of(description.step, slots) == image:
                return description, "ram"
        except CheckpointError as error:
            log.warning("the image in RAM cannot be used (%s); reading %s", error, found.path)
    OpenCheckpoint(plan, found.path, found.path).read()
    return description, "disk"


def describe(path: Location) -> Manifest:
    """The manifest, or what stands for it where another program wrote the checkpoint."""
    if not path.is_dir():
        there = ", ".join(str(step) for step, _ in committed(path.parent)[-8:]) or "none"
        raise CheckpointError(f"there is no checkpoint at {path}; committed steps in {path.parent}: {there}")
    if (path / MANIFEST_NAME).exists() or not any(path.glob("*.safetensors")):
        return read_manifest(path)
    step = parse_step(path.name)
    return Manifest(format=FORMAT, step=-1 if step is None else step, metrics={}, extra=None, files={})
