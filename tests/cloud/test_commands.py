"""The verbs of the command line, on a URL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.core.location import Url
from async_ckpt.core.manifest import read_manifest
from async_ckpt.core.objects import Objects
from async_ckpt_saver import exit_codes
from async_ckpt_saver.cli import main
from async_ckpt_saver.multipart import upload_bytes
from async_ckpt_saver.reservation import Reservations
from tests.cloud.test_object_storage import objects_attempts
from tests.saver import checkpoints
from tests.saver.checkpoints import ADAPTER, LARGE, commit_checkpoint


def copied(url: Url, objects: Objects, scratch: Path, step: int, **changes: Any) -> Path:
    """A checkpoint with real content, as a directory and at `url`."""
    local = commit_checkpoint(scratch / "local", step, scratch, **changes)
    for name in [*read_manifest(local).files, "async_ckpt.json"]:
        upload_bytes(objects, (url / local.name / name).key, (local / name).read_bytes())
    return local


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = exit_codes.OK) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_they_say_of_a_url_what_they_say_of_a_directory(
    url: Url, objects: Objects, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copied(url, objects, tmp_path, 1).parent
    copied(url, objects, tmp_path, 2, tensors=checkpoints.adapter(seed=5), metrics={"loss": 0.25})

    def same(here: Any, there: Any) -> None:
        """But for where it lies, and for how old it is at two moments."""
        assert json.dumps(there).replace(str(url), str(directory)) == json.dumps(here)

    here, there = said(capsys, "ls", str(directory)), said(capsys, "ls", str(url))
    assert [each["latest"] for each in there] == [False, True]
    for each in [*here, *there]:
        assert each.pop("age_s") >= 0
    same(here, there)
    same(said(capsys, "show", str(directory)), said(capsys, "show", str(url)))
    same(said(capsys, "show", str(directory / "checkpoint-1")), said(capsys, "show", str(url / "checkpoint-1")))
    same(said(capsys, "verify", str(directory)), said(capsys, "verify", str(url)))
    before = said(capsys, "diff", str(directory / "checkpoint-1"), str(directory), status=exit_codes.FOUND)
    after = said(capsys, "diff", str(url / "checkpoint-1"), str(url), status=exit_codes.FOUND)
    assert len(after["changed"]) == 2
    same(before, after)
    across = said(capsys, "diff", str(directory / "checkpoint-2"), str(url / "checkpoint-2"))
    assert (across["equal"], across["changed"]) == (before["equal"] + 2, [])


def test_verify_finds_a_flipped_byte_and_where_it_is(
    url: Url, objects: Objects, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of several chunks: the damage is placed within the one that has it."""
    local = copied(url, objects, tmp_path, 1, tensors=checkpoints.adapter(large_elements=5 << 20))
    assert said(capsys, "verify", str(url))[0]["damage"] == []
    data = bytearray((local / ADAPTER).read_bytes())
    assert len(data) > 16 << 20
    data[10 << 20] ^= 1
    objects.write((url / "checkpoint-1" / ADAPTER).key, bytes(data))
    (damage,) = said(capsys, "verify", str(url), status=exit_codes.DAMAGE)[0]["damage"]
    assert (damage["file"], damage["start"], damage["stop"]) == (ADAPTER, 8 << 20, 16 << 20)
    assert damage["tensors"] == [LARGE]
    objects.remove([(url / "checkpoint-1" / ADAPTER).key])
    damage = said(capsys, "verify", str(url), status=exit_codes.DAMAGE)[0]["damage"]
    assert any("there is no such object" in each["what"] for each in damage)


def test_gc_on_a_url(url: Url, objects: Objects, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        copied(url, objects, tmp_path, step)
    found = said(capsys, "gc", str(url), "--keep-last", "1", "--dry-run")
    assert [(each["name"], each["done"]) for each in found] == [("checkpoint-1", False), ("checkpoint-2", False)]
    held = Reservations(objects, url).take(1, "run", "removal", 600.0, objects_attempts())
    objects.remove([(url / ".async-ckpt" / "checkpoint-1").key])
    assert held.fresh
    found = said(capsys, "gc", str(url), "--keep-last", "1")
    assert [(each["name"], each["done"]) for each in found] == [("checkpoint-1", True), ("checkpoint-2", True)]
    assert [each["step"] for each in said(capsys, "ls", str(url))] == [3]


def test_doctor_tries_the_store(url: Url, objects: Objects, capsys: pytest.CaptureFixture[str]) -> None:
    found = {each["check"]: each for each in said(capsys, "doctor", "--root", str(url))}
    for check in ("store", "store clock", "create", "multipart"):
        assert found[check]["verdict"] == "ok", found[check]
    assert objects.walk(url.key) == {}
    nowhere = said(capsys, "doctor", "--root", "s3://nowhere/run", status=exit_codes.FOUND)
    (failed,) = [each for each in nowhere if each["verdict"] == "fail"]
    assert "there is no such bucket" in failed["found"]


def test_a_url_of_nothing_is_an_error_that_names_it(url: Url, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("ls", "show", "verify", "gc"):
        capsys.readouterr()
        assert main([verb, str(url)]) == exit_codes.ERROR
        assert str(url) in capsys.readouterr().err
