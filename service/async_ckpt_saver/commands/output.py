"""What verbs write: sizes and ages for people, tables, and a bar for what takes long, on a terminal that has one."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count_bytes: float) -> str:
    for unit in _UNITS:
        if count_bytes < 1000 or unit == _UNITS[-1]:
            return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1000
    raise AssertionError


def age(seconds: float) -> str:
    for limit_s, unit_s, unit in ((120.0, 1, "s"), (7200.0, 60, "min"), (172800.0, 3600, "h")):
        if seconds < limit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they must be; a head that begins with ">" is that of a column of numbers."""
    texts = [[head.lstrip(">") for head in heads], *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(heads))]
    lines = [
        "  ".join(
            cell.rjust(width) if head.startswith(">") else cell.ljust(width)
            for head, cell, width in zip(heads, row, widths, strict=True)
        ).rstrip()
        for row in texts
    ]
    return "\n".join(lines)


def has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


@contextlib.contextmanager
def progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many bytes were done since. Shows a bar on a terminal (with `rich`), and
    nothing elsewhere: a log is no place for one."""
    if not sys.stderr.isatty() or not has_rich():
        yield lambda done_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    console = Console(stderr=True)
    # On the terminal, what is printed meanwhile goes above the bar. From a file or a pipe rich would take it away.
    above = sys.stdout.isatty()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, redirect_stdout=above) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda done_bytes: bar.update(task, advance=done_bytes)
