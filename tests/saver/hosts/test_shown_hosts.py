"""What a lead's page and metrics tell of the hosts that relay to it."""

from __future__ import annotations

import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.saver.hosts.two_hosts import Job, hosts, possible, status_of
from tests.saver.saver_process import until

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not possible(), reason="needs the right to make mount namespaces (root)")


@pytest.fixture
def base(folder: Path) -> Iterator[str]:
    """Of a lead whose second host keeps a copy of step 1, and whose third host keeps none."""
    with hosts(folder, folder / "root", "abc") as made:
        made[0].kill()
        made[0].start("--http", "0")
        job = Job(made, folder / "root/run", replicas=1).start()
        try:
            for rank in job.ranks:
                rank.stage(1)
            job.committed(1)
            until(lambda: sorted(host.copy_step or 0 for host in status_of(made[0])) == [0, 1], "the lead knows of it")
            found = re.search(r"http://127\.0\.0\.1:\d+", made[0].saver.said())
            assert found is not None
            yield found.group()
        finally:
            job.close()


def test_metrics_tell_which_step_a_host_keeps_a_copy_of(base: str) -> None:
    with urllib.request.urlopen(f"{base}/metrics", timeout=30) as answer:
        told = answer.read().decode()
    assert re.findall(r'^async_ckpt_host_copy_step\{host="[^"]+"\} (\S+)$', told, re.MULTILINE) == ["1.0"]
    assert "async_ckpt_hosts 2.0\n" in told


@pytest.mark.skipif(_CHROMIUM is None, reason="needs chromium")
def test_the_page_tells_which_step_a_host_keeps_a_copy_of(base: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(base)
        page.wait_for_selector("section table")
        section = page.locator("section", has_text="hosts that relay to this saver")
        lines = section.locator("li").all_inner_texts()
        browser.close()
    assert ["1 ranks" in line and "handed over, heard" in line for line in lines] == [True, True]
    assert sorted("keeps a copy of step 1 in RAM" in line for line in lines) == [False, True]
