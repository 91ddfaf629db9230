"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.system.processes import home, remove_home

SUMMARY = "summary"  # the property of a test that says more than whether it passed: a title, then lines

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("counts-not-seconds", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("counts-not-seconds")


@pytest.fixture(scope="session", autouse=True)
def _own_folder() -> Iterator[None]:
    home()
    yield
    remove_home()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tests run in processes of their own (`-n`), whose properties come here with their reports."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    for report in reports:
        for name, lines in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
            if name == SUMMARY:
                terminalreporter.section(lines[0])
                for line in lines[1:]:
                    terminalreporter.write_line(line)
