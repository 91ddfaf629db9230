"""The same order as in tests/system: nothing of a test is left behind."""

from tests.system.conftest import _nothing_left, folder, selected

__all__ = ["_nothing_left", "folder", "selected"]
