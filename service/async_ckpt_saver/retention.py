"""Which checkpoints may go, and how they go."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.holding import BeingRead, removing
from async_ckpt.core.manifest import Metric, checkpoint_name, committed, read_manifest
from async_ckpt.core.retention_policy import Policy

from .filesystem import fsync_directory, remove_tree, rename_new
from .temporaries import claim, new_nonce

logger = logging.getLogger(__name__)


def expired(checkpoints: Sequence[tuple[int, Mapping[str, Metric]]], policy: Policy) -> list[int]:
    """The steps that no rule of `policy` keeps, in ascending order; never the newest.

    `checkpoints` are (step, metrics), in any order. A metric that is missing, no number, NaN or infinite never counts
    as best. Of equal ones the newer is better. While no checkpoint knows the metric of `keep_best`, nothing goes: its
    name is more likely mistyped than every checkpoint worthless.
    """
    kept = kept_by(checkpoints, policy)
    return sorted(step for step, _ in checkpoints if not kept[step])


def kept_by(checkpoints: Sequence[tuple[int, Mapping[str, Metric]]], policy: Policy) -> dict[int, list[str]]:
    """For each step the rules that keep it, as `expired` has them: "newest", "keep_last", "no rule given", ..."""
    if not checkpoints:
        return {}
    kept: dict[int, list[str]] = {step: [] for step, _ in sorted(checkpoints)}
    steps = list(kept)
    kept[steps[-1]].append("newest")
    if policy.keeps_all:
        return {step: [*rules, "no rule given"] for step, rules in kept.items()}
    if policy.keep_best is not None and not any(policy.keep_best[0] in metrics for _, metrics in checkpoints):
        logger.warning(
            "keep_best: no checkpoint has metrics[%r] (there are: %s); nothing is removed",
            policy.keep_best[0],
            ", ".join(sorted({name for _, metrics in checkpoints for name in metrics})) or "none",
        )
        return {step: [*rules, f"keep_best knows no {policy.keep_best[0]}"] for step, rules in kept.items()}
    for step in steps[-policy.keep_last :] if policy.keep_last is not None else []:
        kept[step].append("keep_last")
    for step in steps:
        if policy.keep_every is not None and step % policy.keep_every == 0:
            kept[step].append("keep_every")
    for step in _best(checkpoints, *policy.keep_best) if policy.keep_best is not None else []:
        kept[step].append("keep_best")
    return kept


def remove(directory: str | os.PathLike[str], step: int) -> None:
    """Delete the checkpoint of `step`; a reader sees all of it or none, even across a power loss.

    Raises BeingRead while somebody reads it, CheckpointError if it is not a directory with our manifest for that step,
    or cannot be renamed. What cannot be deleted after that stays hidden, is logged, and goes with the next
    `writer.sweep`.
    """
    path = os.path.join(directory, checkpoint_name(step))
    if os.path.islink(path):
        raise CheckpointError(f"{path} is a symbolic link, not a checkpoint: it is left alone")
    found = read_manifest(path).step
    if found != step:
        raise CheckpointError(f"{path} holds a checkpoint of step {found}: it is left alone")
    name = f".{checkpoint_name(step)}.{new_nonce()}.trash"
    hidden = os.path.join(directory, name)
    with claim(name):
        try:
            with removing(path):
                rename_new(path, hidden)
            # Before anything in it goes: else a power loss could bring back the name with half of the files.
            fsync_directory(directory)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be removed: {error}") from error
        remove_tree(hidden)


def apply_policy(directory: str | os.PathLike[str], policy: Policy, held: Collection[int] = ()) -> list[int]:
    """Remove every checkpoint of a run that `policy` lets go and that is not `held`; returns the steps removed.

    One that is being read, or cannot be removed, is logged and tried again the next time. Raises CheckpointError if
    `directory` cannot be listed.
    """
    if policy.keeps_all:
        return []
    removed = []
    for step in expired(metrics_of(directory), policy):
        if step in held:
            continue
        try:
            remove(directory, step)
        except BeingRead as error:
            logger.info("retention leaves it for now: %s", error)
        except CheckpointError as error:
            logger.error("retention in %s: %s", directory, error)
        else:
            removed.append(step)
    return removed


def metrics_of(directory: str | os.PathLike[str]) -> list[tuple[int, Mapping[str, Metric]]]:
    """The committed steps and their metrics. Raises CheckpointError if `directory` cannot be listed."""
    found: list[tuple[int, Mapping[str, Metric]]] = []
    for step, path in committed(directory):
        try:
            found.append((step, read_manifest(path).metrics))
        except CheckpointError as error:
            logger.warning("retention leaves %s alone: %s", path, error)
    return found


def _best(checkpoints: Sequence[tuple[int, Mapping[str, Metric]]], metric: str, mode: str, count: int) -> list[int]:
    sign = 1 if mode == "min" else -1
    ranked = []
    for step, metrics in checkpoints:
        value = metrics.get(metric)
        if isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
            ranked.append((sign * value, -step))
    return [-negated for _, negated in sorted(ranked)[:count]]


def _is_finite(value: float) -> bool:
    # An int may be too large for math.isfinite.
    return isinstance(value, int) or math.isfinite(value)
