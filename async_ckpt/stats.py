"""What a checkpointer has done so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from .handle import SaveHandle


@dataclass
class Stats:
    """Counts and seconds since attach; `stall_*` is what the training thread spent in `save` and at the fence,
    `busy_wait_s` the part of it that was spent waiting for a free slot."""

    saves: int = 0
    committed: int = 0
    skipped: int = 0
    failed: int = 0
    committed_bytes: int = 0
    stall_total_s: float = 0.0
    stall_max_s: float = 0.0
    busy_wait_s: float = 0.0
    copy_last_s: float = 0.0
    write_last_s: float = 0.0
    commit_last_s: float = 0.0
    uploaded: int = 0
    not_uploaded: int = 0

    def add_stall(self, handle: SaveHandle, seconds: float) -> None:
        handle.stall_s += seconds
        self.stall_total_s += seconds
        self.stall_max_s = max(self.stall_max_s, handle.stall_s)

    def ended(self, handle: SaveHandle) -> None:
        if handle.state == "committed":
            self.committed += 1
            self.committed_bytes += handle.bytes or 0
            self.copy_last_s = handle.copy_s or 0.0
            self.write_last_s = handle.write_s or 0.0
            self.commit_last_s = handle.commit_s or 0.0
        elif handle.state == "skipped":
            self.skipped += 1
        else:
            self.failed += 1
