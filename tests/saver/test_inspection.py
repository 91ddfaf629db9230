"""`ls`, `show` and `diff` on real checkpoints; shapes, dtypes and differences as safetensors and numpy have them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.retention_policy import Policy
from async_ckpt_saver.comparison import Before, Changed, bytes_to_read, compare
from async_ckpt_saver.inspection import inspect, listing
from tests.saver.checkpoints import ADAPTER, LARGE, LORA, STATE, adapter, commit_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        commit_checkpoint(tmp_path / "run", step, tmp_path, metrics={"loss": 100 - step if step < 30 else 99})
    return tmp_path / "run"


def test_a_listing_says_what_there_is_and_why_it_stays(run: Path) -> None:
    shutil.copytree(run / "checkpoint-10", run / "checkpoint-11")  # its manifest is of step 10
    (run / "checkpoint-40").mkdir()
    found = listing(run, Policy(keep_every=20, keep_best=("loss", "max", 2)), now_unix_s=2e10)
    assert [(each.step, each.latest, each.kept_by) for each in found] == [
        (10, False, ["keep_best"]),
        (20, False, ["keep_every"]),
        (30, True, ["newest", "keep_best"]),
    ]
    for each in found:
        files = [path for path in Path(each.path).rglob("*") if path.is_file() and path.name != "async_ckpt.json"]
        assert each.bytes == sum(path.stat().st_size for path in files) > 0
        assert each.age_s > 1e8
    assert [each.kept_by for each in listing(run, Policy(keep_last=1), 0.0)] == [[], [], ["newest", "keep_last"]]
    assert listing(run, Policy(), 0.0)[0].kept_by == ["no rule given"]
    with pytest.raises(CheckpointError, match="is not a directory"):
        listing(run / "none", Policy(), 0.0)


def test_a_checkpoint_is_shown_as_the_library_reads_it(run: Path) -> None:
    shown = inspect(run / "checkpoint-20")
    expected = {
        (file, name, tuple(tensor.shape), tensor.nbytes)
        for file in (ADAPTER, STATE)
        for name, tensor in load_file(run / "checkpoint-20" / file).items()
    }
    assert len(expected) == 4
    assert {(each.file, each.name, each.shape, each.bytes) for each in shown.tensors} == expected
    assert {each.path: (each.tensors, each.dtypes) for each in shown.files if each.tensors} == {
        ADAPTER: (2, {"F32": 2}), STATE: (2, {"F32": 1, "I64": 1}),
    }  # fmt: skip
    assert (shown.step, shown.metrics, shown.extra, shown.world) == (20, {"loss": 80}, {"epoch": 1}, 1)
    assert shown.adapter is not None
    assert shown.adapter["peft_type"] == "LORA"
    assert shown.training_state is not None
    assert shown.training_state["parameters"] == 1
    assert shown.training_state["optimizers"][0] == {"class": "AdamW", "param_groups": [{"params": 1, "lr": 0.1}]}


def test_equal_checkpoints_do_not_differ(tmp_path: Path) -> None:
    a = commit_checkpoint(tmp_path / "a", 1, tmp_path)
    b = commit_checkpoint(tmp_path / "b", 1, tmp_path)
    seen: list[int] = []
    found = compare(a, b, seen.append)
    assert (found.differs, found.equal) == (False, 4)
    assert sum(seen) == bytes_to_read(a, b) > 0


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8"])
def test_what_differs_is_named_and_measured(tmp_path: Path, dtype: str) -> None:
    before = {LORA: numpy.arange(6).reshape(2, 3).astype(dtype), "same": numpy.ones(3, "f4")}
    after = {**before, LORA: before[LORA].copy()}
    after[LORA][1, 2] += 4
    a = commit_checkpoint(tmp_path / "a", 1, tmp_path, tensors=before)
    b = commit_checkpoint(tmp_path / "b", 1, tmp_path, tensors=after)
    found = compare(a, b)
    assert found.changed == [Changed(LORA, before[LORA].nbytes, 4.0)]
    assert (found.equal, found.added, found.removed, found.reshaped, found.values) == (3, [], [], [], [])
    assert found.differs


def test_without_numpy_what_differs_is_named_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = commit_checkpoint(tmp_path / "a", 1, tmp_path, tensors={LORA: numpy.zeros(3, "f4")})
    b = commit_checkpoint(tmp_path / "b", 1, tmp_path, tensors={LORA: numpy.ones(3, "f4")})
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert compare(a, b).changed == [Changed(LORA, 12, None)]


def test_tensors_come_go_and_change_their_shape_and_settings_their_value(tmp_path: Path) -> None:
    one, other = adapter(), {LORA: adapter()[LORA].T.copy(), "new": numpy.ones(1, "f4")}
    a = commit_checkpoint(tmp_path / "a", 1, tmp_path, tensors=one, metrics={"loss": 1.5})
    b = commit_checkpoint(
        tmp_path / "b", 2, tmp_path, tensors=other, metrics={"loss": 0.5}, config={"peft_type": "LORA", "r": 4}
    )
    found = compare(a, b)
    assert (found.added, found.removed) == (["new"], [LARGE])
    assert found.reshaped == [Before(LORA, "F32 [2, 3]", "F32 [3, 2]")]
    assert found.values == [
        Before("metrics.loss", "1.5", "0.5"),
        Before("adapter.r", "2", "4"),
        Before("adapter.base_model_name_or_path", '"tiny"', "null"),
    ]
