"""Do the ranks that hold the same part of a tensor hold the same bytes? Pure."""

from __future__ import annotations

from collections.abc import Iterable

from async_ckpt.core.protocol import SaveRecord


def diverged(records: Iterable[tuple[int, SaveRecord]]) -> str | None:
    """The first part of which two ranks gave different hashes, in a sentence; None if all agree.

    Replicas that silently diverged save whichever of them happens to be written: here they are named.
    """
    seen: dict[str, tuple[int, int]] = {}
    for rank, record in records:
        for part, digest in record.replica_hashes.items():
            other, expected = seen.setdefault(part, (rank, digest))
            if digest != expected:
                return (f"{part} differs between rank {other} and rank {rank}, which should hold the same: the "
                        f"replicas have diverged, for instance because a rank was seeded differently or its gradients "
                        f"were not reduced")  # fmt: skip
    return None
