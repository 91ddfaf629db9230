"""How two checkpoints differ: tensors by name, whatever file they lie in; settings; metrics."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from async_ckpt.core.layout import Extent
from async_ckpt.core.location import Location
from async_ckpt.core.manifest import Manifest, read_manifest
from async_ckpt.core.ranges import open_ranges

from .contents import STATE_DOCUMENT, read_object
from .inspection import adapter_of, layouts_of

_STEP_BYTES = 8 << 20
# What numpy can read; BF16 is the upper half of an F32.
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
          "U8": "u1"}  # fmt: skip


class Changed(msgspec.Struct, frozen=True):
    """`max_abs` is the largest absolute difference, None where numpy is missing or does not know the dtype."""

    name: str
    bytes: int
    max_abs: float | None


class Before(msgspec.Struct, frozen=True):
    """One thing that was `before` in A and is `after` in B."""

    name: str
    before: str
    after: str


class Comparison(msgspec.Struct, frozen=True):
    added: list[str]
    removed: list[str]
    reshaped: list[Before]
    changed: list[Changed]
    equal: int
    values: list[Before]

    @property
    def differs(self) -> bool:
        return bool(self.added or self.removed or self.reshaped or self.changed or self.values)


class _Tensor(msgspec.Struct, frozen=True):
    path: Location
    extent: Extent


def compare(a: Location, b: Location, progress: Callable[[int], None] = lambda done_bytes: None) -> Comparison:
    """Raises CheckpointError if a manifest or a header cannot be read, OSError if a file cannot."""
    manifest_a, manifest_b = read_manifest(a), read_manifest(b)
    in_a, in_b = _tensors(a, manifest_a), _tensors(b, manifest_b)
    reshaped, changed, equal = [], [], 0
    for name in sorted(in_a.keys() & in_b.keys()):
        before, after = in_a[name], in_b[name]
        if before.extent.spec != after.extent.spec:
            reshaped.append(Before(name, _shape(before), _shape(after)))
        elif _same(before, after, progress):
            equal += 1
        else:
            changed.append(Changed(name, before.extent.spec.nbytes, _max_abs(before, after)))
    values = [
        *_values("metrics", manifest_a.metrics, manifest_b.metrics),
        *_values("extra", manifest_a.extra, manifest_b.extra),
        *_values("adapter", adapter_of(a, list(manifest_a.files)), adapter_of(b, list(manifest_b.files))),
        *_values("training_state", _state(a, manifest_a), _state(b, manifest_b)),
    ]
    return Comparison(
        sorted(in_b.keys() - in_a.keys()), sorted(in_a.keys() - in_b.keys()), reshaped, changed, equal, values
    )


def bytes_to_read(a: Location, b: Location) -> int:
    """How many bytes `compare` will tell its progress of, at most."""
    in_a, in_b = _tensors(a, read_manifest(a)), _tensors(b, read_manifest(b))
    return sum(in_a[name].extent.spec.nbytes for name in in_a.keys() & in_b.keys())


def _tensors(checkpoint: Location, manifest: Manifest) -> dict[str, _Tensor]:
    """By folder and name, so that it does not matter into how many files a model was split."""
    return {
        os.path.join(os.path.dirname(path), extent.spec.name): _Tensor(checkpoint / path, extent)
        for path, layout in layouts_of(checkpoint, list(manifest.files)).items()
        for extent in layout.extents
    }


def _shape(tensor: _Tensor) -> str:
    return f"{tensor.extent.spec.dtype} {list(tensor.extent.spec.shape)}"


def _pairs(before: _Tensor, after: _Tensor) -> Iterator[tuple[memoryview, memoryview]]:
    with open_ranges(before.path) as file_a, open_ranges(after.path) as file_b:
        for start in range(0, before.extent.spec.nbytes, _STEP_BYTES):
            stop = min(start + _STEP_BYTES, before.extent.spec.nbytes)
            yield (
                file_a.read(before.extent.start + start, before.extent.start + stop),
                file_b.read(after.extent.start + start, after.extent.start + stop),
            )


def _same(before: _Tensor, after: _Tensor, progress: Callable[[int], None]) -> bool:
    same = True
    for one, other in _pairs(before, after):
        progress(len(one))
        same = same and one == other
    return same


def _max_abs(before: _Tensor, after: _Tensor) -> float | None:
    dtype = before.extent.spec.dtype
    if dtype not in _NUMPY or importlib.util.find_spec("numpy") is None:
        return None
    import numpy

    def values(data: memoryview) -> Any:
        raw = numpy.frombuffer(data, _NUMPY[dtype])
        if dtype == "BF16":
            raw = (raw.astype("<u4") << 16).view("<f4")
        return raw.astype("f8")

    return max(float(numpy.max(numpy.abs(values(one) - values(other)))) for one, other in _pairs(before, after))


def _state(checkpoint: Location, manifest: Manifest) -> dict[str, Any] | None:
    return read_object(checkpoint / STATE_DOCUMENT) if STATE_DOCUMENT in manifest.files else None


def _values(name: str, before: Any, after: Any) -> Iterator[Before]:
    """Leaves of two JSON values that are not equal, named by their way down."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from _values(f"{name}.{key}", before.get(key), after.get(key))
    elif before != after:
        yield Before(name, _short(before), _short(after))


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
