"""What users would pick instead, each called as its own documentation says for a machine without an accelerator."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from .shapes import Subject


class _Peer:
    title = ""
    durable = True

    def setup(self, subject: Subject, folder: Path) -> None:
        self.subject = subject

    def fence(self) -> None:
        """By default `save` has copied everything."""

    def detached(self) -> list[int]:
        return []

    def teardown(self) -> None:
        """By default nothing is kept."""


class Gather(_Peer):
    """Gather the adapter to rank 0 and let PEFT write it: what users do. PEFT syncs nothing; `sync` is added, since a
    checkpoint that a power loss takes is none."""

    title = "gather + save_pretrained + fsync"

    def save(self, target: Path) -> None:
        gathered = {}
        for name, parameter in self.subject.state().items():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            if dist.get_rank() == 0:
                gathered[name] = whole
        if dist.get_rank() == 0:
            # PEFT takes the weights alone; what an optimizer holds goes beside them, as the Trainer does it.
            weights = {name: tensor for name, tensor in gathered.items() if not name.startswith("optim.")}
            self.subject.model.save_pretrained(str(target), state_dict=weights)
            if len(weights) < len(gathered):
                others = {name: tensor for name, tensor in gathered.items() if name.startswith("optim.")}
                torch.save(others, target / "optimizer.pt")
            for path in target.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def wait(self) -> None:
        dist.barrier()


class DcpSave(_Peer):
    title = "dcp.save"

    def save(self, target: Path) -> None:
        dcp.save(self.subject.state(), checkpoint_id=str(target))

    def wait(self) -> None:
        """`save` is synchronous."""


class DcpAsync(_Peer):
    """The default: stages in the calling thread, writes in a thread. The group of its own is required by the
    documentation: collectives of the writing thread must not mix with the training's."""

    title = "dcp.async_save"

    def setup(self, subject: Subject, folder: Path) -> None:
        super().setup(subject, folder)
        self.group = dist.new_group(backend="gloo")
        self.future: Future[Any] | None = None

    def save(self, target: Path) -> None:
        self.future = dcp.async_save(self.subject.state(), checkpoint_id=str(target), process_group=self.group)

    def wait(self) -> None:
        assert self.future is not None
        self.future.result()


class DcpProcess(DcpAsync):
    title = "dcp.async_save, PROCESS"

    def save(self, target: Path) -> None:
        self.future = dcp.async_save(
            self.subject.state(),
            checkpoint_id=str(target),
            process_group=self.group,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )


class DcpAsyncStaging(DcpAsync):
    """With the stager that copies in a thread; the options that need an accelerator are off."""

    title = "dcp.async_save, async staging"

    def setup(self, subject: Subject, folder: Path) -> None:
        super().setup(subject, folder)
        options = StagingOptions(use_pinned_memory=False, use_shared_memory=True, use_async_staging=True,
                                 use_non_blocking_copy=False)  # fmt: skip
        self.stager = DefaultStager(options)
        self.response: Any = None

    def save(self, target: Path) -> None:
        self.response = dcp.async_save(
            self.subject.state(), checkpoint_id=str(target), process_group=self.group, async_stager=self.stager
        )

    def fence(self) -> None:
        self.response.staging_completion.result()

    def wait(self) -> None:
        self.response.upload_completion.result()

    def teardown(self) -> None:
        self.stager.close()


class DcpHuggingFace(DcpAsync):
    title = "dcp.async_save, HF writer"

    def save(self, target: Path) -> None:
        writer = HuggingFaceStorageWriter(str(target), save_distributed=True, enable_consolidation=True)
        self.future = dcp.async_save(self.subject.state(), storage_writer=writer, process_group=self.group)


class TorchCheckpointing(_Peer):
    """torch_checkpointing 0.1: without a resharder, the faster of its two configurations. Its O_DIRECT fails on ext4
    at the first write (EINVAL: lengths that are no blocks), so it has to be off. It syncs nothing."""

    title = "torch_checkpointing"
    durable = False

    def setup(self, subject: Subject, folder: Path) -> None:
        super().setup(subject, folder)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        has_device = torch.accelerator.is_available()
        staging = CheckpointStagerConfig(use_pinned_memory=has_device, use_non_blocking_copy=has_device)
        self.manager = CheckpointManager(
            CheckpointManager.Config(
                save=AsyncCheckpointSaverConfig(staging_config=staging),
                storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
            )
        )
        self.future: Any = None

    def save(self, target: Path) -> None:
        self.future = self.manager.save(str(target), {"model": self.subject.state()})

    def fence(self) -> None:
        with self.manager.lock():
            pass

    def wait(self) -> None:
        self.future.result()

    def teardown(self) -> None:
        with contextlib.suppress(Exception):
            self.manager.close()
