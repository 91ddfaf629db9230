"""What must lie in a directory after kills, judged by other means than async_ckpt's own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors.numpy import load_file

ADAPTER = "adapter_model.safetensors"


def noted(folder: Path, what: str) -> set[int]:
    """The steps that any rank saw as `what`: "staged" (on all ranks) or "committed" (acknowledged to this rank)."""
    return {int(line) for path in folder.glob(f"{what}-*") for line in path.read_text().split()}


def note(file: int, step: int) -> None:
    os.write(file, f"{step}\n".encode())


def open_notes(folder: str, what: str, rank: int) -> int:
    return os.open(Path(folder, f"{what}-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def published(directory: Path) -> dict[int, Path]:
    return {int(path.name.removeprefix("checkpoint-")): path for path in directory.glob("checkpoint-*")}


def check_published(folder: Path, keep_last: int | None) -> None:
    """At any moment, also while nobody has cleaned up: what has its final name is whole, `latest` names one of them,
    and what a rank was told to be committed is there."""
    directory = folder / "runs"
    link = directory / "latest"
    latest = os.readlink(link) if link.is_symlink() else None  # before what it may name: a saver may be at work
    found = published(directory)
    _none_lost(noted(folder, "committed"), set(found), keep_last)
    for step, path in found.items():
        check_whole(path, step)
    names = {path.name for path in found.values()}
    assert latest is None or latest in names, f"latest names {latest}, there are {sorted(names)}"


def check_final(folder: Path, keep_last: int | None) -> None:
    """When every saver has ended: besides, what all ranks had staged is there, `latest` is the newest, and nothing
    else is."""
    directory = folder / "runs"
    staged, found = noted(folder, "staged"), published(directory)
    assert staged
    _none_lost(staged, set(found), keep_last)
    check_published(folder, keep_last)
    assert os.readlink(directory / "latest") == f"checkpoint-{max(found)}"
    strangers = [path.name for path in directory.iterdir() if path.name != "latest" and path not in found.values()]
    assert strangers == []
    assert keep_last is None or len(found) <= keep_last + 1, f"retention left {sorted(found)}"


def _none_lost(promised: set[int], found: set[int], keep_last: int | None) -> None:
    """Retention may remove a step only when `keep_last` newer ones are there."""
    lost = [step for step in promised - found if keep_last is None or len([s for s in found if s > step]) < keep_last]
    assert not lost, f"lost: {sorted(lost)}, there are {sorted(found)}"


def check_whole(path: Path, step: int) -> None:
    """Every file of the manifest with its hash, no other, and every weight is the number of the step."""
    manifest = json.loads((path / "async_ckpt.json").read_bytes())
    assert manifest["step"] == step
    files = {each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file()} - {"async_ckpt.json"}
    assert files == manifest["files"].keys()
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert len(content) == entry["bytes"]
        assert xxhash.xxh3_128_hexdigest(content) == entry["xxh3_128"], f"{path / name} is damaged"
    check_values(load_file(path / ADAPTER), step)


def check_values(tensors: Mapping[str, Any], step: int) -> None:
    """`tensors`: numpy arrays. Asserts that there are some, and that each holds nothing but the number `step`."""
    assert tensors
    for name, tensor in tensors.items():
        values = {float(value) for value in (tensor.min(), tensor.max())}
        assert values == {float(step)}, f"step {step} is torn: {name} holds {sorted(values)}"
