"""What a checkpoint says of itself, for people and scripts. Reads headers and JSON, no tensor."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import FileLayout
from async_ckpt.core.location import Location, Url
from async_ckpt.core.manifest import Manifest, Metric, committed, read_manifest
from async_ckpt.core.retention_policy import Policy

from .contents import ADAPTER_CONFIG, STATE_DOCUMENT, parameters, read_object
from .latest_link import LATEST
from .retention import kept_by
from .tensorfile import SUFFIX, read_layout


class Listed(msgspec.Struct, frozen=True):
    """One checkpoint of a directory. `kept_by` are the rules that keep it, empty if it would go; `latest`: the
    symbolic link names it, or, in an object store, it is the newest."""

    step: int
    path: str
    age_s: float
    bytes: int
    metrics: dict[str, Metric]
    kept_by: list[str]
    latest: bool


class ShownFile(msgspec.Struct, frozen=True):
    """One of the two hashes is "", as in the manifest."""

    path: str
    bytes: int
    xxh3_128: str
    pieces_xxh3_128: str = ""
    tensors: int | None = None
    dtypes: dict[str, int] | None = None


class ShownTensor(msgspec.Struct, frozen=True):
    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


class Shown(msgspec.Struct, frozen=True):
    """All of one checkpoint but its tensors' values. `adapter` is PEFT's configuration, or None; `training_state` is
    what its document says of optimizers and scheduler, with parameters counted."""

    path: str
    step: int
    created_unix_s: float
    world: int
    run: str
    bytes: int
    metrics: dict[str, Metric]
    extra: Any
    versions: dict[str, str]
    files: list[ShownFile]
    tensors: list[ShownTensor]
    adapter: dict[str, Any] | None
    training_state: dict[str, Any] | None


def listing(directory: Location, policy: Policy, now_unix_s: float) -> list[Listed]:
    """The committed checkpoints, in order of step. Raises CheckpointError if `directory` cannot be listed."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: give the one that attach was given")
    manifests: list[tuple[Location, Manifest]] = []
    for _, path in committed(directory):
        try:
            manifests.append((path, read_manifest(path)))
        except CheckpointError:
            if path.exists():  # else retention has removed it since
                raise
    kept = kept_by([(manifest.step, manifest.metrics) for _, manifest in manifests], policy)
    named = _latest(directory, manifests)
    return [
        Listed(
            step=manifest.step,
            path=str(path),
            age_s=max(0.0, now_unix_s - manifest.created_unix_s),
            bytes=manifest.total_bytes,
            metrics=manifest.metrics,
            kept_by=kept[manifest.step],
            latest=path.name == named,
        )
        for path, manifest in manifests
    ]


def _latest(directory: Location, manifests: list[tuple[Location, Manifest]]) -> str | None:
    """The name of the checkpoint that is the latest for others. An object store has no links: the newest is."""
    if isinstance(directory, Url):
        return manifests[-1][0].name if manifests else None
    link = directory / LATEST
    return os.readlink(link) if link.is_symlink() else None


def inspect(checkpoint: Location) -> Shown:
    """Raises CheckpointError if the manifest or a header cannot be read."""
    manifest = read_manifest(checkpoint)
    layouts = layouts_of(checkpoint, list(manifest.files))
    files = []
    for path, entry in manifest.files.items():
        layout = layouts.get(path)
        dtypes = None if layout is None else dict(Counter(extent.spec.dtype for extent in layout.extents))
        count = None if layout is None else len(layout.extents)
        files.append(ShownFile(path, entry.bytes, entry.xxh3_128, entry.pieces_xxh3_128, count, dtypes))
    return Shown(
        path=str(checkpoint),
        step=manifest.step,
        created_unix_s=manifest.created_unix_s,
        world=manifest.world,
        run=manifest.run,
        bytes=manifest.total_bytes,
        metrics=manifest.metrics,
        extra=manifest.extra,
        versions=manifest.versions,
        files=files,
        tensors=[
            ShownTensor(path, extent.spec.name, extent.spec.dtype, extent.spec.shape, extent.spec.nbytes)
            for path, layout in layouts.items()
            for extent in layout.extents
        ],
        adapter=adapter_of(checkpoint, list(manifest.files)),
        training_state=_training_state(checkpoint) if STATE_DOCUMENT in manifest.files else None,
    )


def layouts_of(checkpoint: Location, files: list[str]) -> dict[str, FileLayout]:
    return {path: read_layout(checkpoint / path) for path in files if path.endswith(SUFFIX)}


def adapter_of(checkpoint: Location, files: list[str]) -> dict[str, Any] | None:
    """PEFT's configuration; a non-default adapter has it in a folder of its own."""
    named = [path for path in files if os.path.basename(path) == ADAPTER_CONFIG]
    return read_object(checkpoint / named[0]) if named else None


def _training_state(checkpoint: Location) -> dict[str, Any]:
    document = read_object(checkpoint / STATE_DOCUMENT)
    optimizers = [
        {
            "class": optimizer.get("class"),
            "param_groups": [
                {"params": len(group.get("params", [])), **group.get("settings", {})}
                for group in optimizer.get("param_groups", [])
            ],
        }
        for optimizer in document.get("optimizers", [])
    ]
    return {**document, "optimizers": optimizers, "parameters": len(parameters(checkpoint))}
