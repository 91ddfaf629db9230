"""Flags made from settings, and their effective values."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

from ..settings import FILE_VARIABLE, Setting, Value, read_file, resolve


def add_settings(parser: argparse.ArgumentParser, groups: dict[str, tuple[Setting, ...]]) -> None:
    """A flag for each setting, under the title of its group; the default stays unset, so that `resolve` sees it."""
    for title, settings in groups.items():
        group = parser.add_argument_group(title)
        for setting in settings:
            given = "required" if setting.default is None else f"default: {_shown(setting.default)}"
            group.add_argument(
                setting.flag,
                action="append" if setting.repeatable else "store",
                metavar=setting.metavar,
                help=f"{setting.help} ({given}; {setting.variable})",
            )


def add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help=f"a TOML file with settings; flags and variables win ({FILE_VARIABLE})"
    )


def effective(options: argparse.Namespace, settings: Iterable[Setting]) -> dict[str, Value]:
    """What `options`, the environment and the file say together. Raises SettingsError."""
    file = options.config or os.environ.get(FILE_VARIABLE, "")
    document = read_file(file) if file else {}
    return resolve(settings, vars(options), os.environ, document, file)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"
