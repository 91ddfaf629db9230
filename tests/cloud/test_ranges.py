"""Restoring from a store reads the bytes that a rank holds, and hardly any others."""

from __future__ import annotations

import os

import numpy
import pytest
import safetensors.numpy
import torch

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import TensorSpec
from async_ckpt.core.location import Url
from async_ckpt.core.objects import GAP_BYTES, Objects
from async_ckpt.core.region import Region
from async_ckpt.fetched import Fetched, batches, runs_of
from async_ckpt.restore import OpenFile, Target
from async_ckpt.sharding.shard import Shard

ROWS, COLUMNS = 4096, 512  # 8 MiB of F32


class Piece:
    """A shard of nothing but memory."""

    def __init__(self, region: Region) -> None:
        self.region, self.dtype = region, torch.float32
        self.tensor = torch.zeros(region.sizes)

    def local(self) -> torch.Tensor:
        return self.tensor


@pytest.fixture(scope="module")
def values() -> dict[str, numpy.ndarray]:
    random = numpy.random.default_rng(1)
    return {name: random.standard_normal((ROWS, COLUMNS)).astype("f4") for name in ("a", "b", "c")}


@pytest.fixture
def stored(url: Url, objects: Objects, values: dict[str, numpy.ndarray]) -> Url:
    found = url / "weights.safetensors"
    objects.write(found.key, safetensors.numpy.save(values, {"format": "pt"}))
    return found


def target(name: str, region: Region) -> tuple[Target, Piece]:
    piece = Piece(region)
    shard: Shard = piece  # type: ignore[assignment]
    return Target(name, TensorSpec(name, "F32", (ROWS, COLUMNS)), shard), piece


@pytest.mark.parametrize(
    ("region", "rows", "columns"),
    [
        (Region(False, (0, 0), (ROWS, COLUMNS)), slice(None), slice(None)),
        (Region(False, (1024, 0), (1000, COLUMNS)), slice(1024, 2024), slice(None)),
        (Region(False, (0, 128), (ROWS, 64)), slice(None), slice(128, 192)),
        (Region(False, (7, 3), (1, 1)), slice(7, 8), slice(3, 4)),
    ],
)
def test_a_region_arrives_to_the_byte(
    stored: Url, values: dict[str, numpy.ndarray], region: Region, rows: slice, columns: slice
) -> None:
    file = OpenFile(stored)
    first, a = target("a", region)
    second, c = target("c", region)
    assert file.differences([first, second]) == ["b: in the file, but not in the model"]
    file.read_into([first, second])
    assert numpy.array_equal(a.tensor.numpy(), values["a"][rows, columns])
    assert numpy.array_equal(c.tensor.numpy(), values["c"][rows, columns])
    assert a.tensor.abs().sum() > 0


def test_a_rank_fetches_its_share(stored: Url, values: dict[str, numpy.ndarray]) -> None:
    """A quarter of the rows of each of three tensors: a quarter of the bytes, and the header."""
    file = OpenFile(stored)
    targets = [target(name, Region(False, (1024, 0), (1024, COLUMNS))) for name in values]
    file.read_into([each for each, _ in targets])
    for (each, piece), value in zip(targets, values.values(), strict=True):
        assert numpy.array_equal(piece.tensor.numpy(), value[1024:2048]), each.name
    assert file.fetched is not None
    share = 3 * 1024 * COLUMNS * 4
    assert share <= file.fetched.fetched_bytes <= share + (64 << 10)


def test_memory_is_given_back(stored: Url, values: dict[str, numpy.ndarray]) -> None:
    fetched = Fetched(stored)
    start, stop = 1 << 20, 3 << 20
    with fetched.holding([(start, stop)]):
        assert any(fetched.mapped[start:stop])
    page = os.sysconf("SC_PAGE_SIZE")
    assert not any(fetched.mapped[start + page : stop - page])
    assert fetched.mapped[:8] == len(fetched.mapped[8 : fetched.header_bytes]).to_bytes(8, "little")


def test_runs_and_batches() -> None:
    whole = torch.zeros(100, 1 << 20, dtype=torch.uint8)
    base = whole.data_ptr()
    assert runs_of(whole, base) == [(0, 100 << 20)]
    assert runs_of(whole[3:5], base) == [(3 << 20, 5 << 20)]
    assert runs_of(whole[3], base) == [(3 << 20, 4 << 20)]
    assert runs_of(whole[3, 7], base) == [((3 << 20) + 7, (3 << 20) + 8)]
    narrow = runs_of(whole[:, 10:20], base)
    assert len(narrow) == 100
    assert narrow[1] == ((1 << 20) + 10, (1 << 20) + 20)
    wide = (1 << 20) - GAP_BYTES  # the gaps are not worth a request each
    assert runs_of(whole[:, :wide], base) == [(0, (99 << 20) + wide)]
    spans = [[(200 << 20, 400 << 20)], [(0, 200 << 20)], [(400 << 20, (400 << 20) + 1)]]
    assert list(batches(spans)) == [[1, 0], [2]]


def test_what_is_not_there_or_no_tensors(url: Url, objects: Objects) -> None:
    with pytest.raises(CheckpointError, match="there is no object"):
        OpenFile(url / "nothing.safetensors")
    objects.write((url / "text.safetensors").key, b"this is no safetensors file, but some text")
    with pytest.raises(CheckpointError, match=r"cannot read|is no safetensors file"):
        OpenFile(url / "text.safetensors")
    objects.write((url / "empty.safetensors").key, b"")
    with pytest.raises(CheckpointError, match="it is empty"):
        OpenFile(url / "empty.safetensors")
