"""What is kept mapped is what lies there now, and a removed image gives its memory back, whoever is reading it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from async_ckpt_saver import image_maps
from async_ckpt_saver.image_maps import ImageMaps

SIZE = 3 * mmap.PAGESIZE


@pytest.fixture
def image() -> Iterator[Path]:
    directory = Path("/dev/shm") / f"async-ckpt-test-{os.getpid()}-maps"
    directory.mkdir()
    write(directory, b"a")
    yield directory
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def write(image: Path, content: bytes) -> None:
    (image / "file").write_bytes(content * SIZE)


def mapping(maps: ImageMaps, image: Path, before: Callable[[], object] = lambda: None) -> mmap.mmap:
    with (image / "file").open("rb") as file:
        before()
        return maps.map(str(image), "file", file.fileno())


def mapped_files(image: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{image}/file")


def test_a_file_is_mapped_once_and_shows_what_is_written_to_it(image: Path) -> None:
    maps = ImageMaps()
    first = mapping(maps, image)
    with (image / "file").open("r+b") as file:
        file.write(b"b" * SIZE)
    again = mapping(maps, image)
    assert again is first
    assert again[:] == b"b" * SIZE
    assert mapped_files(image) == 1


@pytest.mark.parametrize("size", [SIZE, SIZE + 1], ids=["as long", "longer"])
def test_another_file_in_its_place_is_another_mapping(image: Path, size: int) -> None:
    maps = ImageMaps()
    mapping(maps, image)
    (image / "file").unlink()
    (image / "file").write_bytes(b"c" * size)
    assert mapping(maps, image)[:] == b"c" * size
    assert mapped_files(image) == 1


def test_a_forgotten_image_stays_mapped_only_while_it_is_read(image: Path) -> None:
    maps = ImageMaps()
    reading = mapping(maps, image)
    maps.forget(str(image))
    assert reading[:1] == b"a"
    assert mapped_files(image) == 1
    del reading
    assert mapped_files(image) == 0


def test_what_is_forgotten_while_it_is_opened_is_not_kept(image: Path) -> None:
    maps = ImageMaps()
    reading = mapping(maps, image, before=lambda: maps.forget(str(image)))
    assert reading[:1] == b"a"
    del reading
    assert mapped_files(image) == 0


def test_no_more_is_kept_than_is_allowed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_maps, "_KEPT_BYTES", SIZE)
    maps = ImageMaps()
    mapping(maps, image)
    (image / "other").write_bytes(b"d")
    with (image / "other").open("rb") as file:
        assert maps.map(str(image), "other", file.fileno())[:] == b"d"
    assert f"{image}/other" not in Path("/proc/self/maps").read_text()
    assert mapped_files(image) == 1
