"""Do the ranks that hold the same part of a tensor hold the same bytes? Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from async_ckpt.core.layout import FileLayout
from async_ckpt.core.protocol import Claim
from async_ckpt.core.region import Region


class ReplicaCheck:
    """Compares the hashes that ranks give of what they hold in common, step by step.

    Adapters that silently diverged between ranks save whichever replica happens to be written: here they are named.
    """

    def __init__(
        self,
        files: Sequence[FileLayout],
        claims: Mapping[int, Sequence[Claim]],
        replicated: Mapping[int, Sequence[int]],
    ) -> None:
        self._names = [[extent.spec.name for extent in file.extents] for file in files]
        self._held = {rank: [claims[rank][index] for index in indices] for rank, indices in replicated.items()}
        self._step: int | None = None
        self._seen: dict[tuple[int, int, Region], tuple[int, int]] = {}

    def add(self, rank: int, step: int, hashes: Sequence[int]) -> str | None:
        """What is wrong with rank `rank`'s replicas in `step`, or None. Steps come in ascending order."""
        if self._step is None or step > self._step:
            self._step, self._seen = step, {}
        held = self._held[rank]
        if step < self._step:
            return None
        if len(hashes) != len(held):
            return f"rank {rank} gave {len(hashes)} hashes of its {len(held)} replicas"
        for claim, digest in zip(held, hashes, strict=True):
            other, expected = self._seen.setdefault((claim.file, claim.tensor, claim.region), (rank, digest))
            if digest != expected:
                name = self._names[claim.file][claim.tensor]
                return (f"tensor {name!r} differs between rank {other} and rank {rank}, which should hold the same: "
                        f"the replicas have diverged, for instance because a rank was seeded differently or its "
                        f"gradients were not reduced")  # fmt: skip
        return None
