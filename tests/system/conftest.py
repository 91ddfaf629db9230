"""Every test leaves the machine as it found it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system import hosts
from tests.system.processes import end_leftovers, home, runs, savers, until

_GONE_S = 30.0  # what the design promises for an embedded saver after the last close, or the death of its run


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """After a test no saver of ours runs, none of its slots is in shared memory, and no host is left."""
    assert (savers(), runs()) == ([], [])
    yield
    try:
        until(lambda: not savers() and not runs(), "every saver and every slot is gone", _GONE_S)
    except AssertionError as error:
        found = f"{error}: savers {savers()}, runs {runs()}"
        end_leftovers()
        pytest.fail(found, pytrace=False)
    if left := hosts.left():
        hosts.end_left()
        pytest.fail(f"processes of hosts are left: {left}", pytrace=False)


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    """A new folder with a short name: paths of sockets are limited to 100 bytes."""
    names = (home() / f"t{number}" for number in itertools.count())
    path = next(name for name in names if not name.exists())  # what else lies there comes and goes
    path.mkdir()
    return path


@pytest.fixture
def selected(request: pytest.FixtureRequest) -> set[Any]:
    """The scenarios of this module that this session runs, for they run together, at the first test."""
    here = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    return {item.callspec.params.get("scenario") for item in here if hasattr(item, "callspec")}
