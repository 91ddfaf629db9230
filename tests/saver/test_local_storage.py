"""Writes land below the root, whatever the names come to mean meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.manifest import check_path
from async_ckpt_saver.local_storage import below_root, prepare_directory
from async_ckpt_saver.writer import CommitError, commit, sweep
from tests.saver.committing import assert_whole, job_of, make_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    return tmp_path / "root"


def nothing_outside(root: Path) -> bool:
    return list((root.parent / "outside").iterdir()) == []


def test_missing_directories_are_made(root: Path) -> None:
    with below_root(str(root / "a/b/c"), root) as place:
        (Path(place) / "file").touch()
    assert (root / "a/b/c/file").exists()


def test_the_root_itself_may_be_missing(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    undo = prepare_directory(root / "run", root)
    assert (root / "run").is_dir()
    undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["run", "a/run", "a/run/b"])
def test_a_link_out_of_the_root_is_refused_before_anything_is_made(root: Path, where: str) -> None:
    """The last component, one before it, and one of which only the end is missing."""
    link = root / where.removesuffix("/b")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(root.parent / "outside")
    for attempt in (
        lambda: prepare_directory(root / where, root),
        lambda: below_root(str(root / where), root).__enter__(),
    ):
        with pytest.raises(CheckpointError, match=r"outside this saver's root"):
            attempt()
    assert nothing_outside(root)


def test_dots_out_of_the_root_are_refused(root: Path) -> None:
    for path in (root / "../outside", root / "a/../../outside/run"):
        with pytest.raises(CheckpointError, match="outside"), below_root(str(path), root):
            pass
    assert nothing_outside(root)


def test_a_link_to_nowhere_is_not_followed(root: Path) -> None:
    (root / "run").symlink_to(root.parent / "outside" / "new")
    with pytest.raises(CheckpointError, match="cannot write to"):
        prepare_directory(root / "run", root)
    assert nothing_outside(root)


def test_a_link_that_stays_below_the_root_is_followed(root: Path) -> None:
    (root / "real").mkdir()
    (root / "link").symlink_to(root / "real")
    with below_root(str(root / "link" / "run"), root) as place:
        (Path(place) / "file").touch()
    assert (root / "real" / "run" / "file").exists()


@pytest.mark.parametrize("component", ["a", "a/run"])
def test_a_link_swapped_in_at_any_point_of_the_commit_changes_nothing(
    root: Path, component: str, tmp_path: Path
) -> None:
    """Between each two system calls of the commit: the checkpoint lands in the directory that was checked."""
    image = make_image(tmp_path / "image", adapter_bytes=5000)
    points: list[str] = []
    with below_root(str(root / "probe"), root) as place:
        commit(msgspec.structs.replace(job_of(root, 1, image), directory=place), step_hook=points.append)
    assert len(points) > 15
    for number in range(len(points)):
        directory = root / f"{number}" / "a/run"
        moved = root / f"{number}" / "moved"
        passed = 0

        def swap(name: str, number: int = number, directory: Path = directory, moved: Path = moved) -> None:
            nonlocal passed
            if passed == number:
                there = directory.parent if component == "a" else directory
                there.rename(moved)
                there.symlink_to(root.parent / "outside")
            passed += 1

        with below_root(str(directory), root) as place:
            commit(msgspec.structs.replace(job_of(directory, 1, image), directory=place), step_hook=swap)
            sweep(place)
        assert nothing_outside(root), points[number]
        landed = (moved / "run" if component == "a" else moved) / "checkpoint-1"
        assert_whole(landed, image)
        assert os.readlink(landed.parent / "latest") == "checkpoint-1"


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["..", ".", "", "a", "/", "\0", "~", "a/b"]), max_size=6).map("/".join)
)
def test_no_name_of_a_file_leads_out_of_its_checkpoint(path: str) -> None:
    try:
        check_path(path)
    except CheckpointError:
        return
    joined = os.path.normpath(os.path.join("/root/checkpoint-1", path))
    assert joined == f"/root/checkpoint-1/{path}"


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", "async_ckpt.json", ""])
def test_a_document_whose_name_leads_out_fails_the_commit(root: Path, tmp_path: Path, name: str) -> None:
    image = make_image(tmp_path / "image", adapter_bytes=5000)
    job = msgspec.structs.replace(job_of(root / "run", 1, image), documents={name: b"x"})
    with pytest.raises(CommitError, match="plain relative path"):
        commit(job)
    assert sorted(path.name for path in root.parent.iterdir()) == ["image", "outside", "root"]
    assert not (root / "run").exists()
