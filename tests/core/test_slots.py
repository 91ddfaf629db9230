"""Slots in shared memory: reserved whole or not at all; cells that a kill cannot forge."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.images import create_slots, image_bytes
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.private import private_directory
from async_ckpt.core.protocol import ImageFile, Layout, Options, SaveRecord
from async_ckpt.core.retention_policy import Policy
from async_ckpt.core.slots import (
    Phase,
    RunRecord,
    SlotPaths,
    StateFile,
    new_run_path,
    read_journals,
    remove_run,
)

FILE = plan_file("sub/adapter_model.safetensors", [TensorSpec("t", "F32", (1000, 3))])
LAYOUT = Layout((ImageFile(FILE.path, FILE.header, FILE.total_bytes),), {"README.md": b"read me"})
ENDPOINT = f"ipc:///nowhere/{secrets.token_hex(4)}"


def record(slots: int = 2, world: int = 2) -> RunRecord:
    return RunRecord("job", Options("/data/run", world, slots, Policy(), 1.0), [FILE.path, "README.md"], [], None, {})


@pytest.fixture
def run() -> Iterator[Path]:
    path = new_run_path(ENDPOINT)
    yield path
    remove_run(path)


@pytest.fixture
def state(tmp_path: Path) -> StateFile:
    StateFile.create(tmp_path / "state", 3)
    return StateFile(tmp_path / "state")


def test_a_slot_is_the_checkpoint_directory_to_come(run: Path) -> None:
    slots = create_slots(run, record(), LAYOUT)
    assert len(slots) == 2
    for slot in slots:
        content = (slot.image / FILE.path).read_bytes()
        assert len(content) == FILE.total_bytes
        assert content.startswith(FILE.header)
        assert (slot.image / "README.md").read_bytes() == b"read me"
        assert (slot.image / FILE.path).stat().st_blocks * 512 >= FILE.total_bytes, "not reserved"
    assert {path.stat().st_mode & 0o077 for path in run.rglob("*") if path.suffix != ".md"} <= {0, 0o044}
    assert run.stat().st_mode & 0o077 == 0


def test_too_large_an_image_says_what_is_needed_and_leaves_nothing(run: Path) -> None:
    huge = plan_file("a.safetensors", [TensorSpec("t", "F32", (1 << 40,))])
    layout = Layout((ImageFile(huge.path, huge.header, huge.total_bytes),), {})
    with pytest.raises(CheckpointError) as error:
        create_slots(run, record(), layout)
    assert str(2 * image_bytes(layout)) in str(error.value)
    assert "bytes available" in str(error.value)
    assert "--shm-size" in str(error.value)
    assert not run.exists()


def test_a_failure_in_between_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="No space left"):
        create_slots(run, record(), LAYOUT)
    assert not run.exists()


def test_the_journal_is_found_by_its_endpoint_alone(run: Path) -> None:
    create_slots(run, record(), LAYOUT)
    assert [(path, found) for path, found in read_journals(ENDPOINT)] == [(run, record())]
    assert list(read_journals(ENDPOINT + "x")) == []


def test_a_run_without_a_journal_is_removed(run: Path) -> None:
    run.mkdir()
    (run / "slot-0").mkdir()
    assert list(read_journals(ENDPOINT)) == []
    assert not run.exists()


def test_a_slot_is_complete_when_every_cell_has_staged_the_same_step(state: StateFile) -> None:
    assert state.complete_step() is None
    for rank in range(3):
        assert state.complete_step() is None
        state.mark(rank, Phase.STAGED, 7, 0.5)
    assert state.complete_step() == 7
    assert (state.cell(1).step, state.cell(1).copy_s) == (7, 0.5)
    state.mark(1, Phase.WRITING, 8)
    assert state.complete_step() is None
    state.mark(1, Phase.STAGED, 8)
    assert state.complete_step() is None


@pytest.mark.parametrize("byte", range(24))
def test_a_torn_cell_reads_as_empty(tmp_path: Path, state: StateFile, byte: int) -> None:
    for rank in range(3):
        state.mark(rank, Phase.STAGED, 7, 0.25)
    with (tmp_path / "state").open("r+b") as file:
        file.seek(64 * 2 + byte)
        old = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old[0] ^ 1]))
    assert state.cell(1).phase is Phase.EMPTY
    assert state.complete_step() is None


def test_another_file_is_no_state_file(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"x" * 256)
    with pytest.raises(CheckpointError, match="no slot state file"):
        StateFile(tmp_path / "state")


def test_the_record_belongs_to_one_step(tmp_path: Path) -> None:
    paths = SlotPaths(tmp_path, 0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        paths.records(2, 3)
    saved = SaveRecord(3, {"loss": 1.5}, {"epoch": 1}, {"a.json": b"{}"})
    paths.write_record(0, saved)
    assert paths.records(2, 3) == [(0, saved)]
    with pytest.raises(CheckpointError, match="belongs to step 3"):
        paths.records(2, 4)
    other = SaveRecord(3, {}, None, {"rank-1.json": b"1"})
    paths.write_record(1, other)
    assert paths.records(2, 3) == [(0, saved), (1, other)]
    paths.write_record(1, SaveRecord(2, {}, None, {"rank-1.json": b"1"}))
    assert paths.records(2, 3) == [(0, saved)], "an older step's record of another rank does not belong to it"
    paths.record(0).write_bytes(b"\xc1")
    with pytest.raises(CheckpointError, match="cannot be read"):
        paths.records(2, 3)


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    with pytest.raises(CheckpointError, match="mode 0700"):
        private_directory(shared)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="mode 0700"):
        private_directory(tmp_path / "link")


@pytest.mark.parametrize(("code", "said"), [(28, "/dev/shm is full.*--shm-size"), (2, "RemoveIPC=no.*attach again")])
def test_a_record_that_cannot_be_written_says_why_and_leaves_the_old_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    slot = create_slots(run, record(), LAYOUT)[0]
    slot.write_record(0, SaveRecord(1, {}, None, {}))

    def half(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("async_ckpt.core.slots.write_private", half)
        with pytest.raises(CheckpointError, match=said):
            slot.write_record(0, SaveRecord(2, {}, None, {}))
    assert slot.read_record(0).step == 1
    assert [path.name for path in run.iterdir() if path.suffix == ".tmp"] == []


def test_a_slot_with_one_hosts_part_is_complete_and_never_whole(tmp_path: Path) -> None:
    for name, part in (("whole", False), ("part", True)):
        StateFile.create(tmp_path / name, 2, part=part)
        state = StateFile(tmp_path / name)
        for rank in (0, 1):
            state.mark(rank, Phase.STAGED, 7)
        state.settle(7)  # writes the beginning anew
        state.close()
        state = StateFile(tmp_path / name)
        assert (state.complete_step(), state.whole_step()) == (7, None if part else 7)
        state.close()
