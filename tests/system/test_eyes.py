"""What a saver shows over HTTP while a real job saves: status, metrics, probes, events, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.processes import Daemon, Job, until
from tests.system.training import adamw, attach, reached, step, wrapped

_HERE = "tests.system.test_eyes"
_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def saves(folder: str, endpoint: str) -> None:
    """Two steps are committed, one fails since its directory's place is taken; the ranks wait for the test's word."""
    model = wrapped("fsdp2")
    optimizer = adamw(model)
    ckpt = attach(model, optimizer, tiers=[Path(folder, "run"), Path(folder, "second")], saver=endpoint, timeout_s=60)
    for number in (1, 2, 3):
        if number == 3 and os.environ["RANK"] == "0":
            Path(folder, "run", "checkpoint-3").mkdir()
        handle = ckpt.save(number, metrics={"loss": 1 / number})
        step(model, optimizer)
        until(lambda handle=handle: handle.state in ("committed", "failed"), "the outcome")
        if number < 3:
            handle.uploaded()
    reached(folder, "saved")
    until(Path(folder, "go").exists, "the test's word", 600.0)  # which comes after all tests of this module
    ckpt.close()


class Shown:
    def __init__(self, daemon: Daemon) -> None:
        port = until(
            lambda: re.search(r"http://127\.0\.0\.1:(\d+)/", daemon.log.read_text()), "the address in the log"
        ).group(1)
        self.base = f"http://127.0.0.1:{port}"
        self.port = int(port)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.base + path, timeout=30) as answer:
            return str(answer.read().decode())

    def status(self) -> Any:
        return json.loads(self.get("/status.json"))

    def metric(self, name: str) -> float:
        """Of a sample by its name and labels, as Prometheus would read it."""
        [value] = re.findall(rf"^{re.escape(name)} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(value)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("eyes")
    with (
        Daemon(folder / "d", folder, "--http", "0") as daemon,
        Job(f"{_HERE}:saves", 2, folder, daemon.endpoint) as job,
    ):
        job.reach("saved")
        yield Shown(daemon)
        (folder / "go").touch()
        job.wait()


def test_status_tells_of_ranks_and_saves(shown: Shown) -> None:
    [run] = shown.status()["runs"]
    assert [rank["alive"] for rank in run["ranks"]] == [True, True]
    assert [(save["step"], save["outcome"]) for save in run["saves"]] == [
        (1, "committed"),
        (2, "committed"),
        (3, "failed"),
    ]
    for save in run["saves"]:
        assert [rank["rank"] for rank in save["staged"]] == [0, 1]
        assert all(rank["stall_s"] > 0 for rank in save["staged"])
    assert run["last_commit_step"] == 2
    [tier] = shown.status()["uploads"]
    assert tier["directory"] == run["directory"]
    assert [(upload["step"], upload["outcome"]) for upload in tier["uploads"]] == [(1, "uploaded"), (2, "uploaded")]
    assert all(upload["upload_s"] > 0 for upload in tier["uploads"])
    assert run["image_bytes"] > 2 * run["saves"][0]["bytes"] > 0


def test_metrics_count_what_happened(shown: Shown) -> None:
    [run] = shown.status()["runs"]
    outcomes = {name: shown.metric(f'async_ckpt_saves_total{{outcome="{name}"}}') for name in ("committed", "failed")}
    assert outcomes == {"committed": 2, "failed": 1}
    assert shown.metric('async_ckpt_failures_total{cause="eexist"}') == 1
    assert shown.metric("async_ckpt_committed_bytes_total") == run["committed_bytes"] > 0
    assert shown.metric("async_ckpt_ranks") == 2
    assert [shown.metric(f"async_ckpt_{name}_seconds_count") for name in ("stall", "copy")] == [3, 3]
    assert [shown.metric(f"async_ckpt_{name}_seconds_count") for name in ("write", "commit")] == [2, 2]
    assert shown.metric("async_ckpt_stall_seconds_sum") > 0
    assert shown.metric("async_ckpt_upload_seconds_count") == 2
    assert shown.metric("async_ckpt_uploaded_bytes_total") == run["committed_bytes"]
    assert shown.metric(f'async_ckpt_last_upload_step{{directory="{run["directory"]}"}}') == 2
    assert shown.metric(f'async_ckpt_last_commit_step{{directory="{run["directory"]}"}}') == 2


def test_probes_say_ok(shown: Shown) -> None:
    assert shown.get("/livez") == "ok\n"
    assert shown.get("/readyz") == "ok\n"


def test_events_begin_with_the_status(shown: Shown) -> None:
    with urllib.request.urlopen(shown.base + "/events", timeout=30) as stream:
        assert stream.headers["Content-Type"] == "text/event-stream"
        for _ in range(2):
            assert json.loads(stream.readline().removeprefix(b"data: "))["runs"][0]["last_commit_step"] == 2
            assert stream.readline() == b"\n"


def test_it_listens_on_loopback_only(shown: Shown) -> None:
    inodes = {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()}
    listening = [address for address in inodes if address.endswith(f":{shown.port:04X}")]
    assert "0100007F:" in "".join(listening)
    assert not [address for address in listening if address.startswith("00000000:")]


def test_a_saver_without_its_root_is_not_ready(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with Daemon(tmp_path / "d", root, "--http", "0") as daemon:
        shown = Shown(daemon)
        assert shown.get("/readyz") == "ok\n"
        root.rmdir()
        with pytest.raises(urllib.error.HTTPError) as refused:
            shown.get("/readyz")
        assert refused.value.code == 503
        assert refused.value.read().decode() == f"the root {root} is not there: is its volume mounted?\n"
        assert shown.get("/livez") == "ok\n"


def test_a_taken_port_ends_the_saver_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = Daemon(tmp_path / "d", tmp_path, "--http", str(port))
        assert daemon.process.wait(60) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in daemon.log.read_text()
    assert "--http" in daemon.log.read_text()
    assert not daemon.socket.exists()


@pytest.mark.skipif(_CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("name", "width"), [("desktop", 1100), ("phone", 390)])
def test_the_page_shows_runs_in_a_browser(shown: Shown, tmp_path: Path, name: str, width: int) -> None:
    """ASYNC_CKPT_TEST_SHOTS names a folder for the screenshots."""
    sync_api = pytest.importorskip("playwright.sync_api")
    complaints: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(shown.base)
        page.wait_for_selector("section table")
        assert page.locator("#connection").inner_text() == "live"
        assert page.locator(".ranks li:not(.gone)").count() == 2
        assert page.locator("tbody tr").count() == 3
        assert page.locator("tbody tr td.bar .write").count() == 2
        assert page.locator("tbody tr td.bar .upload").count() == 2
        assert "step 2" in page.locator("ul.facts li", has_text="uploaded").inner_text()
        assert "checkpoint-3 exists already" in page.locator("tbody td.bad").inner_text()
        drawn = page.evaluate("[...document.querySelectorAll('.timeline i')].map((part) => part.offsetWidth)")
        assert sum(drawn) > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "it has to be scrolled sideways"
        page.screenshot(path=Path(os.environ.get("ASYNC_CKPT_TEST_SHOTS", tmp_path)) / f"page-{name}.png")
        browser.close()
    assert complaints == []
