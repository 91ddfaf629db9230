"""An image to commit, and a judge of what a commit left. As a program: commits and kills itself at a named point."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import xxhash

from async_ckpt.core.manifest import committed, latest, read_manifest
from async_ckpt_saver.writer import CommitJob, commit

ADAPTER = "adapter_model.safetensors"
STATE = "training_state/training_state.safetensors"
DOCUMENTS = {"adapter_config.json": b"{}", "training_state/training_state.json": b'{"step": 1}', "README.md": b""}


def make_image(path: Path, adapter_bytes: int = (9 << 20) + 4097, state_bytes: int = 5000) -> Path:
    """An image with bytes that differ from block to block and from file to file."""
    (path / "training_state").mkdir(parents=True)
    for name, length in ((ADAPTER, adapter_bytes), (STATE, state_bytes)):
        block = os.urandom(4096)
        counted = b"".join(number.to_bytes(8, "little") + block[8:] for number in range(length // 4096 + 1))
        (path / name).write_bytes(counted[:length])
    return path


def job_of(directory: Path, step: int, image: Path) -> CommitJob:
    return CommitJob(
        directory=str(directory),
        step=step,
        image=str(image),
        files=(ADAPTER, STATE),
        documents=DOCUMENTS,
        metrics={"loss": 1 / step},
        extra={"epoch": 1},
        world=2,
        versions={"async_ckpt": "0"},
        run="run-1",
    )


def assert_whole(path: Path, image: Path) -> None:
    """Every byte of the checkpoint is the image's, its manifest says so, and there is nothing else in it."""
    manifest = read_manifest(path)
    found = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
    assert found == {ADAPTER, STATE, *DOCUMENTS, "async_ckpt.json"}
    assert set(manifest.files) == found - {"async_ckpt.json"}
    for name, entry in manifest.files.items():
        data = (path / name).read_bytes()
        assert data == (DOCUMENTS[name] if name in DOCUMENTS else (image / name).read_bytes()), name
        assert (entry.bytes, entry.xxh3_128) == (len(data), xxhash.xxh3_128_hexdigest(data)), name


def assert_consistent(directory: Path, image: Path) -> list[int]:
    """Whatever bears a checkpoint's name is whole, and `latest` is the newest of it. Returns the steps."""
    steps = [step for step, _ in committed(directory)]
    named = [path for path in directory.iterdir() if path.name.startswith("checkpoint-")] if directory.exists() else []
    assert sorted(path.name for path in named) == sorted(f"checkpoint-{step}" for step in steps)
    for path in named:
        assert_whole(path, image)
    assert latest(directory) == (directory / f"checkpoint-{steps[-1]}" if steps else None)
    return steps


def hidden(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


def main(directory: str, step: str, image: str, kill_at: str) -> None:
    """Tells each point on stdout before it is passed; dies at the `kill_at`-th (0-based), if there is one."""
    points = 0

    def step_hook(name: str) -> None:
        nonlocal points
        os.write(1, f"{name}\n".encode())
        if points == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        points += 1

    commit(job_of(Path(directory), int(step), Path(image)), step_hook=step_hook)


def failing_at(point: str, error: BaseException) -> Callable[[str], None]:
    """A `step_hook` that raises `error` there."""

    def step_hook(name: str) -> None:
        if name == point:
            raise error

    return step_hook


if __name__ == "__main__":
    main(*sys.argv[1:])
