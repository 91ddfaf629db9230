"""What a saver tells of uploads to a second tier: `UploadChronicle` is the memory, pure and bounded."""

from __future__ import annotations

import errno
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Literal

import msgspec

REMEMBERED_UPLOADS = 32


class UploadedStep(msgspec.Struct, frozen=True):
    """One upload. `cause`, for counting, is "" unless it failed: "eacces", "enospc", "eio" and other names of errors of
    the system, or "upload_failed". `ended_unix_s` is None while it is under way."""

    step: int
    outcome: Literal["uploading", "uploaded", "failed", "dropped"]
    cause: str
    reason: str
    started_unix_s: float
    ended_unix_s: float | None
    upload_s: float
    bytes: int


class UploadStatus(msgspec.Struct, frozen=True):
    """The second tier of one directory. `queued` are the steps that wait, `behind_s` is for how long the oldest step
    that is newer than everything uploaded has been waiting: 0 when there is none. `last_upload_step` and
    `last_upload_age_s` are None before the first upload that this saver made. `failures` are counted by cause."""

    directory: str
    url: str
    uploading: int | None
    queued: list[int]
    uploads: list[UploadedStep]
    uploaded: int
    uploaded_bytes: int
    dropped: int
    failures: dict[str, int]
    last_error: str
    last_upload_step: int | None
    last_upload_age_s: float | None
    behind_s: float


class UploadChronicle:
    """The last uploads to one place; times are those of `now_s`, which is monotonic; `unix_s` is for people.
    `on_ended` is told of each."""

    def __init__(
        self, now_s: Callable[[], float], unix_s: Callable[[], float], on_ended: Callable[[UploadedStep], None]
    ) -> None:
        self._now_s = now_s
        self._unix_s = unix_s
        self._on_ended = on_ended
        self._uploads: OrderedDict[int, UploadedStep] = OrderedDict()
        self._committed_s: dict[int, float] = {}  # newer than what was uploaded last
        self._started_s = 0.0
        self._uploaded = self._uploaded_bytes = self._dropped = 0
        self._failures: Counter[str] = Counter()
        self._last_error = ""
        self._last: tuple[int, float] | None = None

    def committed(self, step: int) -> None:
        """It is in the first tier, and ought to come to the second."""
        self._committed_s.setdefault(step, self._now_s())
        while len(self._committed_s) > 2 * REMEMBERED_UPLOADS:  # the oldest tells since when
            del self._committed_s[sorted(self._committed_s)[1]]

    def begun(self, step: int) -> None:
        self._started_s = self._now_s()
        self._note(UploadedStep(step, "uploading", "", "", self._unix_s(), None, 0.0, 0))

    def uploaded(self, step: int, size_bytes: int) -> None:
        self._uploaded += 1
        self._uploaded_bytes += size_bytes
        self._last = (step, self._now_s())
        self._committed_s = {each: at_s for each, at_s in self._committed_s.items() if each > step}
        self._end(step, "uploaded", size_bytes=size_bytes)

    def failed(self, step: int, reason: str, error: BaseException) -> None:
        code = getattr(error, "errno", None)
        cause = errno.errorcode.get(code, "upload_failed").lower() if code is not None else "upload_failed"
        self._failures[cause] += 1
        self._last_error = f"step {step}: {reason}"
        self._end(step, "failed", cause, reason)

    def dropped(self, step: int, reason: str) -> None:
        """Also of one that was not begun."""
        self._dropped += 1
        self._end(step, "dropped", reason=reason)

    def status(self, directory: str, url: str, uploading: int | None, queued: list[int]) -> UploadStatus:
        now_s = self._now_s()
        return UploadStatus(
            directory=directory,
            url=url,
            uploading=uploading,
            queued=queued,
            uploads=list(self._uploads.values()),
            uploaded=self._uploaded,
            uploaded_bytes=self._uploaded_bytes,
            dropped=self._dropped,
            failures=dict(self._failures),
            last_error=self._last_error,
            last_upload_step=None if self._last is None else self._last[0],
            last_upload_age_s=None if self._last is None else now_s - self._last[1],
            behind_s=now_s - min(self._committed_s.values(), default=now_s),
        )

    def _end(
        self,
        step: int,
        outcome: Literal["uploaded", "failed", "dropped"],
        cause: str = "",
        reason: str = "",
        size_bytes: int = 0,
    ) -> None:
        now_unix_s = self._unix_s()
        begun = self._uploads.get(step)
        under_way = begun is not None and begun.ended_unix_s is None
        upload_s = self._now_s() - self._started_s if under_way else 0.0
        ended = UploadedStep(
            step, outcome, cause, reason, now_unix_s - upload_s, now_unix_s, upload_s, size_bytes
        )  # fmt: skip
        self._note(ended)
        self._on_ended(ended)

    def _note(self, upload: UploadedStep) -> None:
        self._uploads.pop(upload.step, None)
        self._uploads[upload.step] = upload
        while len(self._uploads) > REMEMBERED_UPLOADS:
            self._uploads.popitem(last=False)
