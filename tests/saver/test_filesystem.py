from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from async_ckpt_saver import filesystem, latest_link
from async_ckpt_saver.filesystem import remove_again, remove_tree


def test_what_could_not_be_removed_is_known_by_its_directory_not_by_a_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path through /proc/self/fd means another directory once the number is given again."""
    monkeypatch.setattr(filesystem, "_unremoved", set())  # of this process, so other tests' as well
    mine, other = tmp_path / "a", tmp_path / "b"
    for folder in (mine / "left", other / "left"):
        folder.mkdir(parents=True)

    def failing(path: str) -> None:
        raise OSError(5, "Input/output error", path)

    fd = os.open(mine, os.O_RDONLY)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", failing)
        assert not remove_tree(f"/proc/self/fd/{fd}/left")
    elsewhere = os.open(other, os.O_RDONLY)
    os.dup2(elsewhere, fd)
    remove_again(f"/proc/self/fd/{fd}")
    os.close(fd)
    os.close(elsewhere)
    assert (mine / "left").is_dir()
    assert (other / "left").is_dir()
    remove_again(str(mine))
    assert not (mine / "left").exists()
    assert filesystem._unremoved == set()


def test_a_hung_disk_of_one_run_holds_up_no_other(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        (folder / "checkpoint-1").mkdir(parents=True)
    hung, go_on = threading.Event(), threading.Event()

    def hang(name: str) -> None:
        hung.set()
        assert go_on.wait(30)

    def newest(directory: Path) -> Path:
        return Path(directory) / "checkpoint-1"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latest_link, "latest", newest)
        thread = threading.Thread(target=lambda: latest_link.point_latest(folders[0], step_hook=hang))
        thread.start()
        assert hung.wait(30)
        assert latest_link.point_latest(folders[1])
        go_on.set()
        thread.join()
    assert [os.readlink(folder / "latest") for folder in folders] == ["checkpoint-1"] * 2
