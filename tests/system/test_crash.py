"""A short slice of the random kills: one of each kind. Many: python -m tests.system.crash --trials 300."""

from __future__ import annotations

import pytest

from tests.system import crash


@pytest.mark.timeout(600)
def test_random_kills() -> None:
    passed, broken = crash.run_trials(len(crash.SCENARIOS), seed=7)
    assert broken == []
    assert sum(passed.values()) == len(crash.SCENARIOS)
