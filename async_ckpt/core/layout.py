"""Where every byte of every tensor lies in a safetensors file.

Guarantee: the header made here is byte-identical to the one that ``safetensors`` 0.4-0.8 writes for the same
tensors, so an image laid out by it *is* the file.

Format (https://huggingface.co/docs/safetensors, and the order of `safetensors/src/tensor.rs`): 8 bytes little-endian
header length; compact JSON with ``__metadata__`` first, then the tensors by (dtype descending, name ascending in
UTF-8 bytes); padded with spaces to a multiple of 8; then the data, without gaps, in the header's order.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from typing import Any

import msgspec

from .errors import CheckpointError
from .limits import MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_TENSORS

# safetensors' `Dtype` enum in its own (ascending) order; the value is the width in bits.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_DTYPE_RANK = {name: rank for rank, name in enumerate(DTYPE_BITS)}
_LENGTH_BYTES = 8


class TensorSpec(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a file: `shape` is the global shape, `dtype` safetensors' name for it ("F32", "BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8


class Extent(msgspec.Struct, frozen=True, gc=False):
    """A tensor and where it lies: bytes [start, stop) of the file, header included."""

    spec: TensorSpec
    start: int
    stop: int


class FileLayout(msgspec.Struct, frozen=True):
    """A whole safetensors file but for its data.

    `path` is relative to the checkpoint directory, `header` the file's first bytes, `extents` in the file's order.
    """

    path: str
    header: bytes
    extents: tuple[Extent, ...]
    total_bytes: int


def plan_file(path: str, tensors: Iterable[TensorSpec]) -> FileLayout:
    """Lay out the file that safetensors would write for `tensors` with PEFT's metadata ``{"format": "pt"}``.

    Raises CheckpointError on an unknown dtype or a name used twice.
    """
    specs = list(tensors)
    if len(specs) > MAX_TENSORS:
        raise CheckpointError(f"{path} would have {len(specs)} tensors, at most {MAX_TENSORS} are allowed")
    for spec in specs:
        if spec.dtype not in _DTYPE_RANK:
            raise CheckpointError(f"tensor {spec.name!r} has dtype {spec.dtype!r}, which safetensors cannot hold")
    specs.sort(key=lambda spec: (-_DTYPE_RANK[spec.dtype], spec.name.encode()))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        if spec.name in entries:
            raise CheckpointError(f"two tensors are named {spec.name!r} in {path}")
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    ends = list(itertools.accumulate((spec.nbytes for spec in specs), initial=len(header)))
    extents = tuple(map(Extent, specs, ends, ends[1:]))
    return FileLayout(path, header, extents, ends[-1])


def parse_file(path: str, head: bytes) -> FileLayout:
    """Read a layout back from a file's first bytes (at least its whole header), whoever wrote it.

    Raises CheckpointError if they are no safetensors header, or if its tensors overlap or leave gaps.
    """
    try:
        length = header_bytes(head)
        if len(head) < length:
            raise ValueError(f"{len(head)} bytes of a header of {length}")
        layout = _read(path, bytes(head[:length]))
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not begin with a safetensors header: {error!r}") from error
    position = length
    for extent in layout.extents:
        if extent.start != position or extent.stop - extent.start != extent.spec.nbytes:
            raise CheckpointError(f"{path}: tensor {extent.spec.name!r} lies at bytes {extent.start}-{extent.stop}, "
                                  f"expected {position}-{position + extent.spec.nbytes}")  # fmt: skip
        position = extent.stop
    return layout


def header_bytes(head: bytes) -> int:
    """Length of the header, its own 8-byte prefix included. Raises ValueError if `head` is too short or absurd."""
    if len(head) < _LENGTH_BYTES:
        raise ValueError(f"{len(head)} bytes, need {_LENGTH_BYTES}")
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
    return _LENGTH_BYTES + length


def _read(path: str, header: bytes) -> FileLayout:
    """Entry by entry: thousands of them at once, as Python's objects, would leave holes in the memory of a process that
    wants to stay small."""
    raw = _decode_header(memoryview(header)[_LENGTH_BYTES:])
    if len(raw) > MAX_TENSORS + 1:
        raise ValueError(f"{len(raw)} tensors, at most {MAX_TENSORS} are allowed")
    raw.pop("__metadata__", None)
    extents = [_extent(name, _decode_entry(entry), len(header)) for name, entry in raw.items()]
    extents.sort(key=lambda extent: (extent.start, extent.stop))
    return FileLayout(path, header, tuple(extents), extents[-1].stop if extents else len(header))


class _Entry(msgspec.Struct, gc=False):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_decode_header = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_entry = msgspec.json.Decoder(_Entry).decode
_NAMES = {name: name for name in DTYPE_BITS}  # one object for all tensors of a dtype


def _extent(name: str, entry: _Entry, header_length: int) -> Extent:
    name.encode()  # JSON can spell text that is none, and an error has to name the tensor
    if len(entry.shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {len(entry.shape)} dimensions, at most {MAX_DIMENSIONS} are allowed")
    for size in (*entry.shape, *entry.data_offsets):
        if not 0 <= size < 1 << 63:  # JSON has no largest number
            raise ValueError(f"{size!r:.40} is no size")
    dtype = _NAMES.get(entry.dtype)
    if dtype is None or math.prod(entry.shape) * DTYPE_BITS[dtype] % 8:
        raise ValueError(f"tensor {name!r} has dtype {entry.dtype} and shape {entry.shape}")
    start, stop = entry.data_offsets
    return Extent(TensorSpec(name, dtype, entry.shape), header_length + start, header_length + stop)
