from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from async_ckpt_saver.settings import (
    BIND,
    KEEP_IMAGE,
    LOG_LEVEL,
    ROOT,
    SETTINGS,
    SHARED_FS,
    SettingsError,
    Value,
    read_file,
    require,
    resolve,
)

FILE = "/etc/saver.toml"
GIVEN = {"flag": "1", "environment": "2", "file": 3, "default": None}
EFFECTIVE = {
    "flag": Value(1.0, "flag", "--keep-image-s"),
    "environment": Value(2.0, "environment", "ASYNC_CKPT_KEEP_IMAGE_S"),
    "file": Value(3.0, "file", FILE),
    "default": Value(900.0, "default"),
}


@pytest.mark.parametrize("given", list(product([True, False], repeat=3)))
def test_flag_before_environment_before_file_before_default(given: tuple[bool, bool, bool]) -> None:
    in_flag, in_environment, in_file = given
    values = resolve(
        [KEEP_IMAGE],
        {"keep_image_s": "1" if in_flag else None},
        {"ASYNC_CKPT_KEEP_IMAGE_S": "2"} if in_environment else {},
        {"keep_image_s": 3} if in_file else {},
        FILE,
    )
    first = next(source for source, there in zip(EFFECTIVE, [*given, True], strict=True) if there)
    assert values == {"keep_image_s": EFFECTIVE[first]}


def test_every_setting_has_its_own_origin() -> None:
    values = resolve(
        SETTINGS,
        {"bind": "ipc:///s", "verb": "run"},
        {"ASYNC_CKPT_ROOT": "/r", "HOME": "/"},
        {"log_level": "debug"},
        FILE,
    )
    assert {name: (value.value, value.source, value.where) for name, value in values.items()} == {
        "bind": ("ipc:///s", "flag", "--bind"),
        "root": ("/r", "environment", "ASYNC_CKPT_ROOT"),
        "log_level": ("debug", "file", FILE),
        "curve_secret": ("", "default", ""),
        "curve_allow": ("", "default", ""),
        "http": ("", "default", ""),
        "keep_image_s": (900.0, "default", ""),
        "grace_s": (25.0, "default", ""),
        "lease_s": (30.0, "default", ""),
        "shared_fs": ("relay", "default", ""),
    }
    require(values, BIND, ROOT)


def test_an_empty_variable_is_not_set() -> None:
    assert resolve([ROOT], {}, {"ASYNC_CKPT_ROOT": ""}, {})["root"] == Value(None, "default")


@pytest.mark.parametrize(
    ("flags", "environ", "document", "said"),
    [
        ({"keep_image_s": "soon"}, {}, {}, "--keep-image-s: 'soon' is not accepted: give a number of seconds"),
        ({}, {}, {"keep_image_s": 10**400}, f"{FILE}: keep_image_s: 1000"),
        ({"keep_image_s": "-1"}, {}, {}, "--keep-image-s: '-1' is not accepted"),
        ({"keep_image_s": "nan"}, {}, {}, "--keep-image-s: 'nan' is not accepted"),
        ({}, {"ASYNC_CKPT_LOG_LEVEL": "loud"}, {}, "ASYNC_CKPT_LOG_LEVEL: 'loud' is not accepted: give one of debug"),
        ({}, {"ASYNC_CKPT_SHARED_FS": "nfs"}, {}, "ASYNC_CKPT_SHARED_FS: 'nfs' is not accepted: give relay or direct"),
        ({}, {}, {"keep_image_s": True}, "/etc/saver.toml: keep_image_s: True is not accepted"),
        ({}, {}, {"keep_image_s": [1]}, "/etc/saver.toml: keep_image_s: [1] is not accepted"),
        ({}, {}, {"bind": 7}, "/etc/saver.toml: bind: 7 is not accepted: give an endpoint"),
        ({}, {}, {"log_level": ["info"]}, "/etc/saver.toml: log_level: ['info'] is not accepted"),
        ({}, {}, {"keep_image": 1}, "/etc/saver.toml: there is no setting 'keep_image': did you mean keep_image_s?"),
        ({}, {}, {"zzz": 1}, "/etc/saver.toml: there is no setting 'zzz': known are bind, root"),
        # Also what another source wins over, and what this verb does not use.
        ({"root": "/r"}, {}, {"root": ""}, "/etc/saver.toml: root: '' is not accepted: give a directory"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_what_is_accepted(
    flags: dict[str, Any], environ: dict[str, str], document: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve([ROOT, KEEP_IMAGE, LOG_LEVEL, SHARED_FS], flags, environ, document, FILE)
    assert str(caught.value).startswith(said)


def test_what_is_missing_is_named_with_the_ways_to_give_it() -> None:
    with pytest.raises(SettingsError, match="give --bind, ASYNC_CKPT_BIND or bind in a file; give --root"):
        require(resolve(SETTINGS, {}, {}, {}), BIND, ROOT)


def test_a_file_is_read_or_the_reason_told(tmp_path: Path) -> None:
    path = tmp_path / "saver.toml"
    path.write_text('bind = "ipc:///s"\nkeep_image_s = 5\n')
    assert read_file(str(path)) == {"bind": "ipc:///s", "keep_image_s": 5}
    path.write_text("bind = \n")
    with pytest.raises(SettingsError, match=r"saver\.toml is not TOML: .*line 1"):
        read_file(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="is not TOML"):
        read_file(str(path))
    with pytest.raises(SettingsError, match="No such file"):
        read_file(str(tmp_path / "none.toml"))


def test_nothing_but_the_caller_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNC_CKPT_KEEP_IMAGE_S", "7")
    monkeypatch.setenv("ASYNC_CKPT_CONFIG", "/nonexistent")
    assert resolve(SETTINGS, {}, {}, {})["keep_image_s"].value == 900.0
