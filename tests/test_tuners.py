"""Every tuner under every wrapper: the bytes are those that PEFT writes for an unwrapped twin, or attach says why not.

The quick part runs by default; `pytest -m ""` or `make test-all` runs the whole matrix and prints what came out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from tests import tuner_table, tuners
from tests.conftest import SUMMARY
from tests.ranks import run_cases
from tests.tuner_cells import DTYPES, WRAPPERS, Cell, all_cells

LAUNCH_TIMEOUT_S = 900.0

# One of each way in which a tensor is found, and what has failed before: under FSDP2 by default.
QUICK_FSDP2 = (
    "lora",
    "lora, DoRA of embeddings",
    "lora, modules_to_save both, tied",
    "lora, trainable_token_indices, tied",
    "lora, two adapters, the second",
    "lora, target_parameters",
    "multitask_prompt_tuning",
    "prefix_tuning",
    "prefix_tuning, prefix_projection",
    "shira",
    "vera",
    "cartridge, num_frozen_tokens=0",
)


def _is_quick(cell: Cell) -> bool:
    if cell.dtype != "fp32":
        return False
    return cell.wrapper == "plain" or (cell.wrapper == "FSDP2" and cell.case in QUICK_FSDP2)


class Matrix:
    """Runs the cells that pytest selected, those of one wrapper in one launch; keeps what came out."""

    def __init__(self, cells: list[Cell]) -> None:
        self._cells = cells
        self._failures: dict[str, str] = {}
        self._launched: set[str] = set()
        self.outcomes: dict[Cell, str] = {}

    def run(self, cell: Cell) -> None:
        self.outcomes[cell] = "failed"
        if cell.wrapper == "plain":
            cell.check()
        else:
            self._launch(cell.wrapper)
            if self._failures[cell.name]:
                pytest.fail(self._failures[cell.name], pytrace=False)
        self.outcomes[cell] = cell.outcome

    def _launch(self, wrapper: str) -> None:
        if wrapper in self._launched:
            return
        self._launched.add(wrapper)
        names = [cell.name for cell in self._cells if cell.wrapper == wrapper]
        self._failures |= run_cases("tests.tuner_cells", names, 2, timeout_s=LAUNCH_TIMEOUT_S)

    @property
    def is_to_be_told(self) -> bool:
        """All that were selected have been run, and they are more than those of every day."""
        return len(self.outcomes) == len(self._cells) and not all(map(_is_quick, self._cells))

    def lines(self) -> Iterator[str]:
        """How many cells of each kind came out how."""
        yield f"{'tuner x wrapper':24}{'saved':>8}{'refused':>9}{'missing':>9}{'failed':>8}"
        groups = [(wrapper, dtype) for wrapper in WRAPPERS for dtype in DTYPES]
        for wrapper, dtype in groups:
            counts = Counter(o for cell, o in self.outcomes.items() if (cell.wrapper, cell.dtype) == (wrapper, dtype))
            yield _line(f"{wrapper}, {dtype}", counts)
        yield _line("all", Counter(self.outcomes.values()))
        for entry, count in Counter(cell.missing for cell in self.outcomes if cell.missing).items():
            what = "missing" if entry.step == "wrap" else "saved without a forward"
            yield f"{what}, {count} cells: {entry.wrapper}, {entry.dtype}, {entry.case}: {entry.reason}"


def _line(title: str, counts: Counter[str]) -> str:
    return f"{title:24}{counts['saved']:8}{counts['refused']:9}{counts['missing']:9}{counts['failed']:8}"


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest) -> Matrix:
    items: list[Any] = request.session.items
    chosen = [item.callspec.params["cell"] for item in items if getattr(item, "function", None) is test_cell]
    return Matrix(chosen)


@pytest.mark.timeout(LAUNCH_TIMEOUT_S + 60)
@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=cell.name, marks=() if _is_quick(cell) else pytest.mark.full) for cell in all_cells()],
)
def test_cell(matrix: Matrix, cell: Cell, record_property: Callable[[str, object], None]) -> None:
    try:
        matrix.run(cell)
    finally:
        if matrix.is_to_be_told:
            record_property(SUMMARY, ["tuners", *matrix.lines()])


def test_every_tuner_of_peft_is_in_the_catalogue() -> None:
    exported = set(PeftType) | set(PEFT_TYPE_TO_CONFIG_MAPPING) | set(PEFT_TYPE_TO_TUNER_MAPPING)
    known = {case.kind for case in tuners.CASES.values()}
    added = sorted(kind.value for kind in exported - known)
    assert not added, f"PEFT {peft.__version__} added {', '.join(added)}: give each a case in tests/tuners.py"


def test_quick_cases_exist() -> None:
    assert set(QUICK_FSDP2) <= tuners.CASES.keys()


def test_the_table_in_docs_is_current() -> None:
    path = Path(__file__).parent.parent / "docs" / "tuners.md"
    assert path.read_text() == tuner_table.table(), "docs/tuners.md is outdated: run python -m tests.tuners"
