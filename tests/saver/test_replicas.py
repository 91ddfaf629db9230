"""Ranks that hold the same part must hold the same bytes; the first tensor that differs is named."""

from __future__ import annotations

from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.protocol import Claim
from async_ckpt.core.region import Region
from async_ckpt_saver.coverage import assign_owners
from async_ckpt_saver.replicas import ReplicaCheck

FILE = plan_file("a", [TensorSpec("whole", "F32", (4,)), TensorSpec("sharded", "F32", (6,))])
INDEX = {extent.spec.name: index for index, extent in enumerate(FILE.extents)}


def check(world: int = 3) -> ReplicaCheck:
    claims = {
        rank: [
            Claim(0, INDEX["sharded"], Region(False, (2 * rank,), (2,))),
            Claim(0, INDEX["whole"], Region.whole((4,))),
        ]
        for rank in range(world)
    }
    ownership = assign_owners([FILE], claims)
    assert ownership.replicated == {rank: [1] for rank in range(world)}
    return ReplicaCheck([FILE], claims, ownership.replicated)


def test_equal_replicas_pass_in_every_step() -> None:
    replicas = check()
    for step in (1, 2, 5):
        assert [replicas.add(rank, step, [step * 10]) for rank in range(3)] == [None] * 3


def test_the_tensor_and_the_ranks_are_named() -> None:
    replicas = check()
    assert replicas.add(0, 1, [10]) is None
    assert replicas.add(1, 1, [10]) is None
    reason = replicas.add(2, 1, [11])
    assert reason is not None
    assert "tensor 'whole' differs between rank 0 and rank 2" in reason
    assert [replicas.add(rank, 2, [20]) for rank in range(3)] == [None] * 3


def test_a_repeated_report_is_not_a_difference() -> None:
    replicas = check()
    assert replicas.add(0, 1, [10]) is None
    assert replicas.add(0, 1, [10]) is None
    assert replicas.add(1, 2, [20]) is None
    assert replicas.add(0, 1, [10]) is None, "an older step, said again"


def test_the_wrong_number_of_hashes_is_told() -> None:
    assert check().add(0, 1, []) == "rank 0 gave 0 hashes of its 1 replicas"
