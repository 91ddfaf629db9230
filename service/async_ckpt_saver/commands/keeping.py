"""Flags that say which checkpoints are to be kept."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..settings import SettingsError

if TYPE_CHECKING:
    from async_ckpt.core.retention_policy import Policy


def add_policy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to keep; without any, every checkpoint stays, and the newest always does")
    group.add_argument("--keep-last", type=int, metavar="N", help="the N newest checkpoints")
    group.add_argument("--keep-every", type=int, metavar="N", help="those whose step is a multiple of N")
    group.add_argument("--keep-best", metavar="METRIC:min|max:N", help="the N best by a metric, as in eval_loss:min:2")


def policy_of(options: argparse.Namespace) -> Policy:
    """Raises SettingsError naming the flag."""
    from async_ckpt.core.errors import CheckpointError
    from async_ckpt.core.retention_policy import Policy

    best = None
    if options.keep_best is not None:
        parts = options.keep_best.rsplit(":", 2)
        if len(parts) != 3 or not parts[2].isdigit():
            raise SettingsError(
                f"--keep-best: {options.keep_best!r} is not accepted: give METRIC:min:N or METRIC:max:N"
            )
        best = (parts[0], parts[1], int(parts[2]))
    try:
        return Policy(keep_last=options.keep_last, keep_every=options.keep_every, keep_best=best)
    except CheckpointError as error:
        raise SettingsError(str(error)) from error
