"""Which shapes are measured, and how often."""

from __future__ import annotations

from .shapes import Shape

ALL = (
    "gather",
    "dcp.save",
    "dcp.async",
    "dcp.async-staging",
    "dcp.process",
    "dcp.hf",
    "torch-checkpointing",
    "overlap",
    "sync",
    "buffered",
)
MAIN = ("dcp.async", "torch-checkpointing", "overlap", "sync")

MAIN_SHAPE = "560"
SHAPES = (
    Shape(MAIN_SHAPE, "560 tensors, 207 MB", 2, 40, 16, ALL, repetitions=7, loops=3, restores=True),
    Shape("2240", "2240 tensors, the same bytes", 2, 160, 4, MAIN, repetitions=5, loops=0),
    Shape("1120", "1120 tensors, 414 MB", 2, 80, 16, MAIN, repetitions=3, loops=1),
    Shape("560-adamw", "560 tensors and AdamW's state, 621 MB", 2, 40, 16, MAIN, repetitions=3, loops=1, adamw=True),
    Shape("1120-adamw", "1120 tensors and AdamW's state, 1242 MB", 2, 80, 16, MAIN, repetitions=2, loops=0, adamw=True),
    Shape("560-4-ranks", "560 tensors, 207 MB, 4 ranks", 4, 40, 16, MAIN, repetitions=3, loops=0),
)
QUICK = (
    Shape(MAIN_SHAPE, "28 tensors, 0.6 MB", 2, 2, 16, ALL, repetitions=2, loops=1, restores=True, scale=16),
    Shape("2240", "112 tensors, the same bytes", 2, 8, 4, MAIN, repetitions=2, loops=0, scale=16),
)  # fmt: skip


def shapes(*, quick: bool) -> dict[str, Shape]:
    return {shape.name: shape for shape in (QUICK if quick else SHAPES)}
