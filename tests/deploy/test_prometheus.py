"""Alerts: understood and tested by promtool, about metrics that exist, and explained."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.deploy.metric_names import SAVER_METRICS, unknown
from tests.deploy.tools import DEPLOY, ROOT, promtool

_FOLDER = DEPLOY / "prometheus"


def alerts() -> list[dict[str, Any]]:
    document = yaml.safe_load((_FOLDER / "rules.yaml").read_text())
    found = [rule for group in document["groups"] for rule in group["rules"]]
    assert len(found) == 13
    return found


def test_promtool_understands_the_rules_and_the_scrape_configuration() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", "rules.yaml")
    promtool("check", "config", "--syntax-only", "scrape.yaml")


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    tests = yaml.safe_load((_FOLDER / "rules_test.yaml").read_text())["tests"]
    for rule in alerts():
        (mine,) = [test["alert_rule_test"] for test in tests if test["name"] == rule["alert"]]
        assert {case["alertname"] for case in mine} == {rule["alert"]}
        assert any(case["exp_alerts"] for case in mine)
        assert any(not case["exp_alerts"] for case in mine)
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yaml")


def test_each_alert_is_about_metrics_that_exist() -> None:
    for rule in alerts():
        assert unknown(rule["expr"], SAVER_METRICS) == set(), rule["alert"]


def test_each_alert_has_its_section_in_the_runbook_and_no_section_is_without() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    sections = re.split(r"^### ", page.partition("\n## Alerts\n")[2], flags=re.MULTILINE)[1:]
    headings = [section.splitlines()[0] for section in sections]
    assert headings == [rule["alert"] for rule in alerts()]
    for rule, section in zip(alerts(), sections, strict=True):
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"  # mkdocs' anchor
        assert 3 < len(section.strip().splitlines()) < 14, rule["alert"]
    named = set(re.findall(r"\basync_ckpt_[a-z_]+[a-z]\b", page)) - {"async_ckpt_saver"}
    assert len(named) >= 4
    assert named <= set(SAVER_METRICS)


def test_each_alert_says_what_it_means_and_what_to_do() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
