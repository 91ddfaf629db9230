"""Saves faster than the disk: training waits, memory stays what it was, and a disk that stands still stops nobody for
longer than `timeout_s`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.system.crash_checks import check_whole
from tests.system.processes import run_cases, runs_of, the_saver
from tests.system.training import attach, rank, refusal, trained, wrapped
from tests.tiny_llama import lora

SAVES = 200
_TIMEOUT_S = 3.0
_SAVER_GROWTH_BYTES = 1 << 20  # what allocators and the log's buffers may take; one checkpoint is nine times that


def shared_bytes(directory: Path) -> int:
    """What the run of `directory` holds in shared memory, in allocated blocks. A save's record, a block, is there twice
    for the moment in which it replaces the one before it: the new one does not count until then."""
    (run,) = runs_of(directory)
    return sum(path.stat().st_blocks * 512 for path in run.rglob("*") if path.suffix != ".tmp" and path.is_file())


def private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def large() -> torch.nn.Module:
    model: torch.nn.Module = wrapped(
        "fsdp2", config=lora(r=600, target_modules=["down_proj"]), hidden_size=384, intermediate_size=1500
    )
    return model


def fill(model: torch.nn.Module, step: int) -> None:
    with torch.no_grad():
        for parameter in trained(model):
            parameter.fill_(step)


def memory_is_constant(folder: Path) -> None:
    """200 saves of 9 MB, none of which waits for the one before it by itself: `save` does, and says for how long."""
    model = large()
    ckpt = attach(model, directory=folder, keep_last=2, timeout_s=60)
    shared, private, waited = set(), [], 0
    for step in range(1, SAVES + 1):
        ckpt.fence()
        fill(model, step)
        before_s = ckpt.stats()["busy_wait_s"]
        handle = ckpt.save(step)
        waited_s = ckpt.stats()["busy_wait_s"] - before_s
        waited += waited_s > 0
        assert handle.stall_s >= waited_s
        if rank() == 0 and step >= SAVES // 4:  # the saver's threads and buffers are there by then
            shared.add(shared_bytes(folder))
            private.append(private_bytes(the_saver(folder)))
    ckpt.wait()
    stats = ckpt.stats()
    ckpt.close()
    assert (stats["saves"], stats["committed"], stats["skipped"], stats["failed"]) == (SAVES, SAVES, 0, 0)
    print(f"{waited} of {SAVES} saves waited, {stats['busy_wait_s']:.2f} s; shared memory {shared}; saver private "
          f"{min(private, default=0)} to {max(private, default=0)} bytes", flush=True)  # fmt: skip
    assert waited > SAVES // 2
    if rank() == 0:
        assert len(shared) == 1, shared
        assert max(private) - private[0] <= _SAVER_GROWTH_BYTES
        check_whole(folder / f"checkpoint-{SAVES}", SAVES)


def skips_without_a_collective(folder: Path) -> None:
    """Whatever is skipped is skipped everywhere, though no rank asks another; what is committed is whole."""
    model = large()
    ckpt = attach(model, directory=folder, when_busy="skip", timeout_s=60)
    handles = []
    sent = int(dist.group.WORLD._get_sequence_number_for_group())
    for step in range(1, SAVES + 1):
        ckpt.fence()
        fill(model, step)
        handles.append(ckpt.save(step))
    assert int(dist.group.WORLD._get_sequence_number_for_group()) == sent
    for handle in handles:
        with contextlib.suppress(Exception):
            handle.wait()
    outcomes = [handle.state for handle in handles]
    everybodys: list[list[str]] = [[], []]
    dist.all_gather_object(everybodys, outcomes)
    assert everybodys[0] == everybodys[1]
    stats = ckpt.stats()
    ckpt.close()
    print(f"{stats['committed']} committed, {stats['skipped']} skipped", flush=True)
    assert stats["committed"] > 1
    assert stats["skipped"] > 1
    assert stats["committed"] + stats["skipped"] == SAVES
    assert stats["busy_wait_s"] == 0
    if rank() == 0:
        for step, state in enumerate(outcomes, 1):
            assert (folder / f"checkpoint-{step}").exists() == (state == "committed")
            if state == "committed":
                check_whole(folder / f"checkpoint-{step}", step)


@contextlib.contextmanager
def frozen(mount: Path) -> Iterator[None]:
    """Every rank is within the block only while the filesystem stands still: who writes waits in the kernel, and no
    signal reaches it."""
    dist.barrier()
    if rank() == 0:
        subprocess.run(["fsfreeze", "--freeze", str(mount)], check=True)
    dist.barrier()
    try:
        yield
        dist.barrier()
    finally:
        if rank() == 0:
            subprocess.run(["fsfreeze", "--unfreeze", str(mount)], check=True)


def a_stuck_disk(folder: Path) -> None:
    mount = folder.parent / "mount"
    directory = mount / "run"
    model = large()
    ckpt = attach(model, directory=directory, timeout_s=_TIMEOUT_S)
    fill(model, 1)
    ckpt.save(1).wait(60)
    with frozen(mount):
        handles = []
        for step in range(2, 8):
            ckpt.fence()
            fill(model, step)
            handles.append(ckpt.save(step))
        assert all(handle.stall_s < _TIMEOUT_S + 1 for handle in handles)
        assert [handle.state for handle in handles] == ["staged", "staged", *["failed"] * 4]
        assert "slot 1 still holds step 2" in refusal(handles[2].wait)
        assert "is not committed after 0.01 s" in refusal(lambda: handles[0].wait(0.01))
    assert [handle.wait(60) for handle in handles[:2]] == [directory / f"checkpoint-{step}" for step in (2, 3)]
    ckpt.fence()
    fill(model, 8)
    ckpt.save(8).wait(60)
    stats = ckpt.stats()
    ckpt.close()
    assert (stats["saves"], stats["committed"], stats["failed"]) == (8, 4, 4)
    assert stats["busy_wait_s"] >= _TIMEOUT_S
    if rank() == 0:
        names = [f"checkpoint-{step}" for step in (1, 2, 3, 8)]
        assert sorted(os.listdir(directory)) == [*names, "latest"]
        for step in (1, 2, 3, 8):
            check_whole(directory / f"checkpoint-{step}", step)


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case for case in (memory_is_constant, skips_without_a_collective, a_stuck_disk)
}


@pytest.fixture
def mount(folder: Path) -> Iterator[Path]:
    """A small ext4 of its own, at `folder`/mount."""
    image, path = folder / "image", folder / "mount"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(256 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(path)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs to mount a loop device: {error}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("case", ["memory_is_constant", "skips_without_a_collective"])
def test_backpressure(folder: Path, case: str) -> None:
    assert run_cases("tests.system.test_backpressure", [case], 2, folder) == {case: ""}


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("fsfreeze") is None, reason="needs root and fsfreeze")
def test_a_stuck_disk(folder: Path, mount: Path) -> None:
    assert run_cases("tests.system.test_backpressure", ["a_stuck_disk"], 2, folder) == {"a_stuck_disk": ""}
