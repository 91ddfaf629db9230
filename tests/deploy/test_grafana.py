"""The dashboard asks for nothing that no saver gives."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.metric_names import SAVER_METRICS, unknown
from tests.deploy.tools import DEPLOY, knows_option, promtool, saver_environment

_GRAFANA = {"$__rate_interval": "5m", "$__interval": "1m", "$instance": ".*"}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "async_ckpt.json").read_text())
    return found


def expressions() -> list[str]:
    """All PromQL of the dashboard, Grafana's variables filled in."""
    document = dashboard()
    found = [target["expr"] for panel in document["panels"] for target in panel["targets"]]
    found += [annotation["expr"] for annotation in document["annotations"]["list"]]
    assert len(found) > 20
    for name, value in _GRAFANA.items():
        found = [expression.replace(name, value) for expression in found]
    return found


def test_promtool_parses_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"q:{number}", "expr": each} for number, each in enumerate(expressions())]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", "rules.yaml", cwd=tmp_path)


def test_every_query_is_about_metrics_that_exist() -> None:
    for expression in expressions():
        assert unknown(expression, SAVER_METRICS) == set(), expression
    (variable,) = [each for each in dashboard()["templating"]["list"] if each["name"] == "instance"]
    name = re.fullmatch(r"label_values\((\w+), instance\)", variable["query"]["query"])
    assert name is not None
    assert name.group(1) in SAVER_METRICS


def test_panels_have_numbers_names_and_room_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_a_real_saver_gives_every_metric_under_this_name(tmp_path: Path) -> None:
    """What the dashboard and the alerts are checked against is what a saver says."""
    if not knows_option("--http"):
        pytest.skip("this saver has no --http yet")
    given = dict(re.findall(r"^# TYPE (\S+) (\S+)$", metrics_of_a_saver(tmp_path), re.MULTILINE))
    assert len(given) > 10
    assert {name: given.get(name) for name in SAVER_METRICS} == SAVER_METRICS


def metrics_of_a_saver(folder: Path) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "async_ckpt_saver", "run", "--bind", f"ipc://{folder}/s", "--root", str(folder)]
    process = subprocess.Popen([*command, "--http", str(port)], env=saver_environment(), stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 30
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                    return str(answer.read().decode())
            except urllib.error.URLError:
                assert process.poll() is None, "the saver ended"
                assert time.monotonic() < deadline_s, "the saver's listener does not answer"
                time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
