"""Ranks that hold the same part must hold the same bytes; the first part that differs is named."""

from __future__ import annotations

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.protocol import Claim, SaveRecord
from async_ckpt.core.region import Region
from async_ckpt_saver.coverage import assign_owners
from async_ckpt_saver.replicas import diverged


def record(**hashes: int) -> SaveRecord:
    return SaveRecord(1, {}, None, {}, hashes)


def test_equal_replicas_pass() -> None:
    assert diverged([(0, record(a=1, b=2)), (1, record(a=1)), (2, record(b=2))]) is None
    assert diverged([]) is None


def test_the_part_and_the_ranks_are_named() -> None:
    reason = diverged([(0, record(a=1, b=2)), (1, record(a=1)), (3, record(b=3))])
    assert reason is not None
    assert reason.startswith("b differs between rank 0 and rank 3")


def test_only_what_several_ranks_hold_is_to_be_hashed() -> None:
    file = plan_file("a", [TensorSpec("whole", "F32", (4,)), TensorSpec("sharded", "F32", (6,))])
    index = {extent.spec.name: number for number, extent in enumerate(file.extents)}
    claims = {
        rank: [
            Claim(0, index["sharded"], Region(False, (2 * rank,), (2,))),
            Claim(0, index["whole"], Region.whole((4,))),
        ]
        for rank in range(3)
    }
    packed = {rank: pack_claims([file], each)[0] for rank, each in claims.items()}
    assert assign_owners([file], packed).replicated == {0: [1], 1: [1], 2: [1]}
