from __future__ import annotations

import errno
import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import Metric, committed, latest
from async_ckpt.core.retention_policy import Policy
from async_ckpt_saver import filesystem, retention
from async_ckpt_saver.retention import apply_policy, expired, remove
from async_ckpt_saver.writer import CommitJob, commit, sweep

Checkpoints = list[tuple[int, dict[str, Metric]]]
counts = st.none() | st.integers(1, 6)
policies = st.builds(
    Policy,
    keep_last=counts,
    keep_every=counts,
    keep_best=st.none() | st.tuples(st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 4)),
)
metric_values = st.none() | st.booleans() | st.text(max_size=2) | st.integers() | st.floats()
metrics = st.dictionaries(st.sampled_from(["loss", "other"]), metric_values)
checkpoint_lists = st.dictionaries(st.integers(0, 40), metrics, max_size=12).flatmap(
    lambda found: st.permutations(list(found.items()))
)


@given(checkpoint_lists, policies)
def test_the_newest_never_goes_and_nothing_unknown_goes(checkpoints: Checkpoints, policy: Policy) -> None:
    gone = expired(checkpoints, policy)
    steps = [step for step, _ in checkpoints]
    assert gone == sorted(set(gone))
    assert set(gone) <= set(steps)
    assert not steps or max(steps) not in gone


@given(checkpoint_lists, policies)
def test_applying_it_again_takes_nothing_more(checkpoints: Checkpoints, policy: Policy) -> None:
    gone = expired(checkpoints, policy)
    assert expired([pair for pair in checkpoints if pair[0] not in gone], policy) == []


@given(checkpoint_lists, policies)
def test_a_checkpoint_stays_if_and_only_if_a_rule_keeps_it(checkpoints: Checkpoints, policy: Policy) -> None:
    steps = [step for step, _ in checkpoints]
    kept = set(steps) - set(expired(checkpoints, policy))
    unknown = policy.keep_best is not None and not any("loss" in found for _, found in checkpoints)
    if policy == Policy() or unknown:
        assert kept == set(steps)
        return
    expected = {max(steps)} if steps else set()
    if policy.keep_last:
        expected |= {step for step in steps if sum(other > step for other in steps) < policy.keep_last}
    if policy.keep_every:
        expected |= {step for step in steps if step % policy.keep_every == 0}
    if policy.keep_best:
        _, mode, count = policy.keep_best
        for step, found in checkpoints:
            value = found.get("loss")
            if usable(value):
                rivals = [(found["loss"], other) for other, found in checkpoints if usable(found.get("loss"))]
                expected |= {step} if sum(beats(rival, (value, step), mode) for rival in rivals) < count else set()
    assert kept == expected


def usable(value: Metric) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def beats(one: tuple[Any, int], other: tuple[Any, int], mode: Literal["min", "max"]) -> bool:
    if one[0] == other[0]:
        return one[1] > other[1]
    return bool(one[0] < other[0] if mode == "min" else one[0] > other[0])


def test_without_a_rule_everything_stays() -> None:
    assert expired([(step, {}) for step in range(100)], Policy()) == []
    assert expired([], Policy(keep_last=1)) == []


def test_rules_add_up() -> None:
    checkpoints: Checkpoints = [(step, {"loss": abs(step - 30)}) for step in range(10, 110, 10)]
    policy = Policy(keep_last=2, keep_every=50, keep_best=("loss", "min", 1))
    assert expired(checkpoints, policy) == [10, 20, 40, 60, 70, 80]


def test_no_usable_metric_keeps_only_the_newest() -> None:
    values: list[Metric] = [None, float("nan"), float("-inf"), "0", True]
    checkpoints: Checkpoints = [(step, {"loss": value}) for step, value in enumerate(values)]
    assert expired([*checkpoints, (9, {})], Policy(keep_best=("loss", "min", 3))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep_last": 0},
        {"keep_last": -1},
        {"keep_last": 1.5},
        {"keep_last": True},
        {"keep_every": 0},
        {"keep_every": "10"},
        {"keep_best": ("loss", "min")},
        {"keep_best": ("loss", "least", 1)},
        {"keep_best": ("loss", "min", 0)},
        {"keep_best": ("loss", "min", True)},
        {"keep_best": ("", "min", 1)},
        {"keep_best": (1, "min", 1)},
        {"keep_best": "loss"},
        {"keep_best": 3},
    ],
)
def test_an_impossible_policy_is_refused_with_its_value(arguments: dict[str, Any]) -> None:
    [(name, value)] = arguments.items()
    with pytest.raises(CheckpointError) as caught:
        Policy(**arguments)
    assert f"{name}={value!r}" in str(caught.value)
    assert "give" in str(caught.value)


@given(policies)
def test_a_policy_survives_the_wire(policy: Policy) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(policy), type=Policy) == policy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "image" / "sub").mkdir(parents=True)
    (tmp_path / "image" / "sub" / "f").write_bytes(b"bytes")
    for step in range(1, 6):
        commit_step(tmp_path, step)
    return tmp_path / "run"


def commit_step(root: Path, step: int) -> None:
    job = CommitJob(str(root / "run"), step, str(root / "image"), ("sub/f",), metrics={"loss": abs(step - 2)})
    commit(job)


def steps_in(run: Path) -> list[int]:
    return [step for step, _ in committed(run)]


def test_applying_a_policy_removes_what_it_lets_go(run: Path) -> None:
    assert apply_policy(run, Policy()) == []
    assert apply_policy(run, Policy(keep_last=2, keep_best=("loss", "min", 1))) == [1, 3]
    assert steps_in(run) == [2, 4, 5]
    assert sorted(os.listdir(run)) == ["checkpoint-2", "checkpoint-4", "checkpoint-5", "latest"]
    assert apply_policy(str(run), Policy(keep_last=2, keep_best=("loss", "min", 1))) == []
    assert apply_policy(run / "missing", Policy(keep_last=1)) == []


def test_what_is_held_stays_until_it_is_not(run: Path) -> None:
    assert apply_policy(run, Policy(keep_last=1), {1, 3}) == [2, 4]
    assert steps_in(run) == [1, 3, 5]
    assert apply_policy(run, Policy(keep_last=1)) == [1, 3]


def test_only_our_own_checkpoints_are_removed(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-0").mkdir()
    (run / "checkpoint-0" / "trainer_state.json").write_bytes(b"{}")
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-7")
    (run / "checkpoint-2" / "async_ckpt.json").write_bytes(b"damaged")
    shutil.move(run / "checkpoint-3", tmp_path / "checkpoint-3")
    (run / "checkpoint-3").symlink_to(tmp_path / "checkpoint-3")
    for step in (0, 2, 3, 7, 9):
        with pytest.raises(CheckpointError, match=f"checkpoint-{step}"):
            remove(run, step)
    assert apply_policy(run, Policy(keep_last=1)) == [1, 4]
    names = ["checkpoint-0", "checkpoint-2", "checkpoint-3", "checkpoint-5", "checkpoint-7", "latest"]
    assert sorted(os.listdir(run)) == names
    assert (tmp_path / "checkpoint-3" / "sub" / "f").read_bytes() == b"bytes"


def test_the_name_is_gone_durably_before_any_file_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def record_sync(directory: Path) -> None:
        events.append("sync")
        assert steps_in(run) == [1, 3, 4, 5]

    def record_removal(path: str) -> bool:
        events.append("remove")
        assert sorted(os.listdir(path)) == ["async_ckpt.json", "sub"]
        return True

    monkeypatch.setattr(retention, "fsync_directory", record_sync)
    monkeypatch.setattr(retention, "remove_tree", record_removal)
    remove(run, 2)
    assert events == ["sync", "remove"]
    [trash] = [name for name in os.listdir(run) if name.endswith(".trash")]
    assert sweep(run) == [trash]


def test_a_removal_that_fails_half_way_leaves_nothing_under_the_name(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: str) -> None:
        os.unlink(os.path.join(path, "async_ckpt.json"))
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", fail)
        assert apply_policy(run, Policy(keep_last=4)) == [1]
    assert "broken" in caplog.text
    assert steps_in(run) == [2, 3, 4, 5]
    assert len(sweep(run)) == 1
    assert sorted(os.listdir(run)) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5", "latest"]


def test_one_that_cannot_be_removed_does_not_stop_the_others(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rename_new = filesystem.rename_new

    def refuse_first(source: str, destination: str) -> None:
        if source.endswith("checkpoint-1"):
            raise OSError(errno.EACCES, "denied")
        rename_new(source, destination)

    monkeypatch.setattr(retention, "rename_new", refuse_first)
    assert apply_policy(run, Policy(keep_last=3)) == [2]
    assert "denied" in caplog.text
    assert steps_in(run) == [1, 3, 4, 5]
    assert latest(run) == run / "checkpoint-5"


def test_a_mistyped_metric_costs_no_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    checkpoints: Checkpoints = [(1, {"eval_loss": 2.0}), (2, {"eval_loss": 1.0}), (3, {})]
    assert expired(checkpoints, Policy(keep_best=("eval_los", "min", 1))) == []
    assert "no checkpoint has metrics['eval_los'] (there are: eval_loss)" in caplog.text
    assert expired(checkpoints, Policy(keep_best=("eval_loss", "min", 1))) == [1]


def test_neither_the_order_of_making_nor_any_time_stamp_counts(run: Path) -> None:
    """Clocks jump and disks are copied: only steps tell what is new."""
    for step in range(1, 6):
        stamp_s = 2_000_000_000 - step * 100_000_000
        os.utime(run / f"checkpoint-{step}", (stamp_s, stamp_s))
    assert latest(run) == run / "checkpoint-5"
    assert apply_policy(run, Policy(keep_last=2)) == [1, 2, 3]
    assert latest(run) == run / "checkpoint-5"
