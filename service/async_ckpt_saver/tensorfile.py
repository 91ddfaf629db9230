"""A safetensors file on disk, as its header describes it. Reads nothing but the header."""

from __future__ import annotations

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import Extent, FileLayout, header_bytes, parse_file
from async_ckpt.core.location import Location
from async_ckpt.core.ranges import open_ranges

SUFFIX = ".safetensors"
_FIRST_BYTES = 64 << 10  # most headers are shorter: then it takes one request


def read_layout(path: Location) -> FileLayout:
    """Raises CheckpointError if it cannot be read, is no safetensors file, or is longer or shorter than its header
    says; its tensors are known to lie without a gap behind the header."""
    try:
        with open_ranges(path) as file:
            length = file.bytes
            head = bytes(file.read(0, min(_FIRST_BYTES, length)))
            head += file.read(len(head), min(header_bytes(head), length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    layout = parse_file(path.name, head)
    if layout.total_bytes != length:
        raise CheckpointError(f"{path} has {length} bytes, its header describes {layout.total_bytes}")
    return layout


def tensors_within(layout: FileLayout, start: int, stop: int) -> list[Extent]:
    """Those with at least one byte in [start, stop) of the file."""
    return [each for each in layout.extents if each.start < stop and start < each.stop]
