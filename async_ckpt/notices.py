"""SIGTERM and SIGUSR1 as notices that this process will be ended soon."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from async_ckpt.core.errors import CheckpointError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Kubernetes, spot machines, torchrun; Slurm's --signal
_ONE_NOTICE_S = 5.0  # a service manager signals the whole job, and torchrun's agent passes on what it got itself

Handler = Callable[[int, FrameType | None], object]


class Notices:
    """The first signal calls `on_notice` in the handler, so that must neither lock nor block; what was handled in
    Python before is called as well. The same signal again, more than 5 s later, does what it did before: so somebody
    who insists still ends the process.

    Raises CheckpointError outside the main thread, where Python lets nobody handle signals.
    """

    def __init__(self, on_notice: Callable[[], None]) -> None:
        require_main_thread()
        self._on_notice = on_notice
        self._pid = os.getpid()
        self._first_s: dict[int, float] = {}
        self._closed = False
        self._previous: dict[int, Handler | int | None] = {
            int(number): signal.signal(number, self._handle) for number in SIGNALS
        }

    @property
    def received(self) -> str | None:
        """The name of the first signal that came, if one did."""
        return next((signal.Signals(number).name for number in list(self._first_s)), None)

    def close(self) -> None:
        """Signals do again what they did before. A handler that was installed over ours stays."""
        self._closed = True
        if threading.current_thread() is not threading.main_thread():
            return  # our handler only passes on from now on
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked worker of a data loader. Slurm's notice is for its parent, which still needs it.
            if number != signal.SIGUSR1:
                self._act(number, frame)
            return
        now_s = time.monotonic()
        if self._closed or now_s - self._first_s.setdefault(number, now_s) > _ONE_NOTICE_S:
            self._act(number, frame)
            return
        self._on_notice()
        previous = self._previous[number]
        if callable(previous):
            previous(number, frame)

    def _act(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous[number]
        if callable(previous):
            previous(number, frame)
        elif previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def require_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise CheckpointError("preemption=True handles signals, which Python allows in the main thread only: "
                              "call attach there")  # fmt: skip
