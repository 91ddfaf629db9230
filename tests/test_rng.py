"""Random numbers go on where they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from async_ckpt.rng import restore_rng, rng_shards


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()),
            float(torch.rand(())), float(torch.randn(()))]  # fmt: skip


@pytest.mark.parametrize("before", [0, 1, 2])
def test_every_generator_goes_on_where_it_was(before: int) -> None:
    """Gaussian numbers come in pairs, and the second waits in the generator."""
    for _ in range(before):
        draw()
    shards = [shard for shard in rng_shards(1, 3) if shard.region.numel]
    assert len(shards) >= 5
    saved = {shard.generator: shard.local().clone() for shard in shards}
    expected = [draw() for _ in range(3)]
    restore_rng(saved)
    assert [draw() for _ in range(3)] == expected


def test_a_rank_holds_its_own_states_and_knows_the_names_of_all() -> None:
    shards = rng_shards(1, 3)
    assert {shard.name.split(".")[1] for shard in shards} == {"rank0", "rank1", "rank2"}
    assert all(shard.name.startswith("rng.rank") for shard in shards)
    assert {shard.name.split(".")[1] for shard in shards if shard.region.numel} == {"rank1"}
    assert all(shard.is_buffer for shard in shards)


def test_what_is_not_in_the_checkpoint_is_left_alone() -> None:
    state = torch.get_rng_state()
    restore_rng({})
    assert torch.equal(torch.get_rng_state(), state)
