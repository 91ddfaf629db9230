"""What every integration needs."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from peft import PeftModel

from async_ckpt.attaching import attach
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import local_path
from async_ckpt.core.manifest import MANIFEST_NAME, parse_step
from async_ckpt.core.slots import SHM, Phase, RunRecord, SlotPaths, StateFile
from async_ckpt.plan import DEFAULT_ADAPTER

_COMMIT_S = 10.0
_POLL_S = 0.01
_EXPORT = ".async-ckpt-export"


def adapter_names(model: torch.nn.Module) -> tuple[str, ...]:
    """All adapters of the PEFT model in `model`, however wrapped: `save_pretrained` writes them all."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            return tuple(module.peft_config)
    return (DEFAULT_ADAPTER,)


def is_ours(checkpoint: str | Path) -> bool:
    return Path(checkpoint, MANIFEST_NAME).is_file()


def check_start(directory: str | Path, step: int, advice: str) -> None:
    """Steps only grow: a loop that begins at `step` must not find later checkpoints, whoever wrote them, in its way.

    Raises CheckpointError before the training has cost anything.
    """
    place = local_path(directory, "Trainer's output_dir")
    names = [path.name for path in place.glob("checkpoint-*") if path.is_dir()]
    newest = max((found for found in map(parse_step, names) if found is not None), default=-1)
    if newest > step:
        raise CheckpointError(
            f"{directory} already holds checkpoint-{newest}, but this training begins after step {step}: {advice}; or "
            f"choose another directory, or move the later checkpoints away"
        )


def wait_for_staged(directory: str | Path) -> None:
    """Return when nothing that the ranks of a killed run had staged for `directory` waits to be committed: only then is
    the newest checkpoint the one to go on from. Gives up after 10 s, for a saver may be gone; attach starts another."""
    deadline_s = time.monotonic() + _COMMIT_S
    while _awaits_commit(str(Path(directory).expanduser().resolve())) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _awaits_commit(directory: str) -> bool:
    for journal in SHM.glob(f"async-ckpt-{os.getuid()}/*/run.msgpack"):
        with contextlib.suppress(OSError, ValueError, CheckpointError):  # the run may end while we look
            record = msgspec.msgpack.decode(journal.read_bytes(), type=RunRecord)
            if record.options.directory == directory:
                for index in range(record.options.slots):
                    with contextlib.closing(StateFile(SlotPaths(journal.parent, index).state)) as state:
                        step = _staged_step(state, record)
                        if step is not None and step > state.settled_step:
                            return True
    return False


def _staged_step(state: StateFile, record: RunRecord) -> int | None:
    """The step that all ranks have staged, as far as this host knows: cells of other hosts' ranks stay empty where a
    saver relays."""
    if record.lead is None:
        return state.complete_step()
    cells = [state.cell(peer.rank) for peer in record.peers]
    steps = {cell.step for cell in cells}
    return steps.pop() if len(steps) == 1 and all(cell.phase is Phase.STAGED for cell in cells) else None


def files_written(write: Callable[[Path], object]) -> dict[str, bytes]:
    """What `write` puts into the folder that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def export(model: torch.nn.Module, directory: str | Path, *, rank: int) -> None:
    """Write the weights alone into `directory` itself, as `save_pretrained` of the unwrapped model would; blocks.

    Every rank calls it; nothing is gathered. A file that is there already is replaced in one step, when the new one is
    durable. Raises CheckpointError if that cannot be done; then `directory` is as it was.
    """
    hidden = local_path(directory, "exporting the weights") / _EXPORT
    try:
        with attach(model, directory=hidden, slots=1, adapter_name=adapter_names(model)) as ckpt:
            path = hidden / ckpt.save(ckpt.next_step).wait().name
        if rank == 0:
            for source in sorted(path.rglob("*")):
                if source.is_file() and source.name != MANIFEST_NAME:
                    target = Path(directory) / source.relative_to(path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source.replace(target)
    finally:
        if rank == 0:
            shutil.rmtree(hidden, ignore_errors=True)
