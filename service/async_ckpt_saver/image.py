"""A run in shared memory: its slots, and what their journals say."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.images import create_slots
from async_ckpt.core.protocol import Layout, Settled, Started
from async_ckpt.core.slots import (
    Phase,
    RunRecord,
    SlotPaths,
    StateFile,
    new_run_path,
    read_journals,
    remove_run,
    write_journal,
)

from .hosts.parts import rest_of
from .hosts.shares import write_shares
from .hosts.spans import Span
from .image_maps import ImageMaps
from .replicas import diverged
from .run import Commit, StagedCell
from .writer import CommitJob, Parts


class RunImage:
    """The slots of one run and the journal that tells what is in them."""

    def __init__(self, path: Path, record: RunRecord, slots: list[SlotPaths]) -> None:
        self.path = path
        self.record = record
        self.slots = slots
        self.states = [StateFile(slot.state) for slot in slots]
        self._maps = ImageMaps()

    @classmethod
    def create(
        cls, endpoint: str, record: RunRecord, layout: Layout, shares: Mapping[int, Sequence[Span]] | None = None
    ) -> RunImage:
        """`shares`: what ranks of other hosts own, or, at a relay, those of this one: then nothing else is reserved.
        Where hosts write their parts themselves, nothing is for those of the others.

        Raises CheckpointError if shared memory cannot hold the slots; then nothing is left of them."""
        path = new_run_path(endpoint)
        only = None
        if record.lead is not None:
            only = [(span.file, span.start, span.stop) for spans in (shares or {}).values() for span in spans]
        elif record.hosts_write:
            rest = rest_of([file.total_bytes for file in layout.files], (shares or {}).values(), whole_files=True)
            only = [(span.file, span.start, span.stop) for span in rest]
        image = cls(path, record, create_slots(path, record, layout, only))
        if shares:
            try:
                write_shares(path, layout, shares)
            except CheckpointError:
                image.remove()
                raise
        return image

    def sizes_bytes(self) -> list[int]:
        """Of each of `record.files`. Raises CheckpointError."""
        try:
            return [(self.slots[0].image / name).stat().st_size for name in self.record.files]
        except OSError as error:
            raise CheckpointError(f"the image of {self.path} cannot be looked at: {error}") from error

    def allocated_bytes(self) -> int:
        """The shared memory that the run holds now: 0 once it has been removed."""
        total_bytes = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total_bytes += os.stat(os.path.join(folder, name)).st_blocks * 512
        return total_bytes

    @classmethod
    def left_behind(cls, endpoint: str) -> tuple[list[RunImage], list[RunRecord]]:
        """The runs of an earlier saver on this endpoint, and the records of those that had not started: these are
        removed, since their ranks will register again, and so is one whose slots are damaged."""
        found, unstarted = [], []
        for path, record in read_journals(endpoint):
            try:
                slots = [SlotPaths(path, index) for index in range(record.options.slots)]
                if record.started is None:
                    unstarted.append(record)
                    remove_run(path)
                    continue
                found.append(cls(path, record, [slot for slot in slots if slot.state.exists()]))
            except (OSError, CheckpointError):
                remove_run(path)
        return found, unstarted

    def start(self, started: Started) -> None:
        """Note in the journal what the ranks are about to be told."""
        self.record = msgspec.structs.replace(self.record, started=started)
        write_journal(self.path, self.record)

    @property
    def directory(self) -> str:
        return self.record.options.directory

    def staged_cells(self, rank: int | None = None) -> list[StagedCell]:
        """What the journal says, in the order of steps: the truth where a message may have been lost."""
        ranks = range(self.record.options.world) if rank is None else (rank,)
        cells = []
        for slot, state in enumerate(self.states):
            for each in ranks:
                cell = state.cell(each)
                if cell.phase is Phase.STAGED:
                    cells.append(StagedCell(cell.step, slot, each))
        return sorted(cells)

    def unheard(
        self, rank: int, before: int, but: int | None, settled: Callable[[int], Settled | None]
    ) -> list[StagedCell]:
        """What `rank` has staged before that step and no outcome was told of, slot `but` left out, in order. Asked for
        each report, and nearly always there is none."""
        for slot, state in enumerate(self.states):
            if slot != but and -1 < (step := state.perhaps_staged(rank)) < before and settled(step) is None:
                break
        else:
            return []
        return [cell for cell in self.staged_cells(rank)
                if self.states[cell.slot].settled_step < cell.step < before]  # fmt: skip

    def settle(self, slot: int, step: int) -> None:
        if 0 <= slot < len(self.states):
            self.states[slot].settle(step)

    def commit_job(self, commit: Commit, parts: Parts | None = None) -> CommitJob:
        """`parts` is needed where the image has only this host's. Raises CheckpointError if a record of the step cannot
        be read, or if replicas have diverged."""
        if self.record.hosts_write != (parts is not None):
            raise CheckpointError(f"{self.path} has only this host's part of a checkpoint")  # and holes, read as zeros
        slot = self.slots[commit.slot]
        records = slot.records(self.record.options.world, commit.step)
        if self.record.options.verify_replicas and (reason := diverged(records)) is not None:
            raise CheckpointError(reason)
        _, record = records[0]
        documents = {path: content for _, each in records for path, content in each.documents.items()}
        return CommitJob(
            directory=self.directory,
            step=commit.step,
            image=str(slot.image),
            files=tuple(self.record.files),
            documents=documents,
            metrics=record.metrics,
            extra=record.extra,
            world=self.record.options.world,
            run=self.path.name,
            versions=self.record.versions,
            timeout_s=self.record.options.timeout_s,
            parts=parts,
            maps=self._maps,
        )

    def newest_image(self) -> tuple[int, SlotPaths] | None:
        """The newest step that lies whole in a slot."""
        complete = [(state.whole_step(), slot) for state, slot in zip(self.states, self.slots, strict=True)]
        whole = [(step, slot) for step, slot in complete if step is not None]
        return max(whole, key=lambda image: image[0], default=None)

    def keep_only(self, kept: SlotPaths) -> None:
        for slot in self.slots:
            if slot is not kept:
                slot.remove()
                self._maps.forget(str(slot.image))

    def remove(self) -> None:
        for state in self.states:
            state.close()
        remove_run(self.path)
        for slot in self.slots:
            self._maps.forget(str(slot.image))
