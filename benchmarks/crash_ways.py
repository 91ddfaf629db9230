"""async_ckpt and its peers as `crash_peers` drives them, each called as its own documentation says.

Each has `save`, `staged` (returns when parameters may be written again), `committed` (returns when the peer
acknowledges the save), `load` (into the model; raises if it cannot) and `close`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Ours:
    def __init__(self, model: Any, folder: Path) -> None:
        from async_ckpt import attach

        self._ckpt = attach(model, directory=folder, timeout_s=30)
        self._handle: Any = None

    def save(self, target: Path, step: int) -> None:
        self._handle = self._ckpt.save(step)

    def staged(self) -> None:
        self._handle.staged()

    def committed(self) -> None:
        self._handle.wait(30)

    def load(self, target: Path) -> None:
        assert self._ckpt.restore(target) is not None

    def close(self) -> None:
        self._ckpt.close()


class Dcp:
    """Its documentation asks for a process group of its own, and to wait for one save before the next."""

    mode = "thread"

    def __init__(self, model: Any, folder: Path) -> None:
        import torch.distributed as dist

        self._model = model
        self._group = dist.new_group(backend="gloo")
        self._future: Any = None

    def save(self, target: Path, step: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self._future = dcp.async_save(
            state_of(self._model),
            checkpoint_id=str(target),
            process_group=self._group,
            async_checkpointer_type=AsyncCheckpointerType(self.mode),
        )

    def staged(self) -> None:
        """`save` has copied everything when it returns."""

    def committed(self) -> None:
        self._future.result(30)

    def load(self, target: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(state_of(self._model), checkpoint_id=str(target))

    def close(self) -> None:
        """It has nothing of the kind."""


class DcpProcess(Dcp):
    mode = "process"


class TorchCheckpointing:
    def __init__(self, model: Any, folder: Path) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        self._model = model
        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)  # no accelerator
        self._manager = CheckpointManager(
            CheckpointManager.Config(
                save=AsyncCheckpointSaverConfig(staging_config=staging),
                storage_config=LocalFileSystemStorageConfig(use_direct_io=False),  # it fails on ext4
            )
        )
        self._future: Any = None

    def save(self, target: Path, step: int) -> None:
        self._future = self._manager.save(str(target), {"model": state_of(self._model)})

    def staged(self) -> None:
        with self._manager.lock():
            pass

    def committed(self) -> None:
        self._future.result(30)

    def load(self, target: Path) -> None:
        self._manager.load(str(target), into={"model": state_of(self._model)})

    def close(self) -> None:
        self._manager.close()


PEERS: dict[str, Any] = {
    "async_ckpt": Ours,
    "dcp.async_save": Dcp,
    "dcp.async_save, PROCESS": DcpProcess,
    "torch_checkpointing": TorchCheckpointing,
}


def state_of(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
