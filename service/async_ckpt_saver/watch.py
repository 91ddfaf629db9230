"""Who is still alive: a pidfd for processes that this saver can see, a lease renewed by pings for the others."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Hashable

from async_ckpt.core.processes import process_of, uid_of
from async_ckpt.core.protocol import Process

log = logging.getLogger(__name__)

_FRESH_S = 5.0  # ranks ping every second


class ProcessWatch:
    """Calls `on_exit(key)` once for each added process when it has exited, or has been silent for `lease_s`.

    A process in another pid namespace (a sidecar container) cannot be seen; only those need the lease, so that a rank
    that is merely stopped or slow is never taken for dead where the kernel can tell.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        now_s: Callable[[], float],
        on_exit: Callable[[Hashable], None],
        *,
        lease_s: float = 30.0,
    ) -> None:
        self._loop = loop
        self._now_s = now_s
        self._on_exit = on_exit
        self._lease_s = lease_s
        self._pidfds: dict[Hashable, int] = {}
        self._polled: dict[Hashable, Process] = {}
        self._last_seen_s: dict[Hashable, float] = {}
        self._namespace = process_of(os.getpid()).pid_namespace

    def add(self, key: Hashable, process: Process) -> None:
        self.discard(key)
        if process.pid_namespace != self._namespace:
            self._last_seen_s[key] = self._now_s()
            return
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._loop.call_soon(self._on_exit, key)
            return
        except (
            OSError,
            AttributeError,
        ) as error:  # an old kernel, a sandbox: look now and then
            log.debug("no pidfd for %d: %s", process.pid, error)
            self._polled[key] = process
            return
        if _start_ticks(process.pid) != process.start_ticks:  # the pid was given to someone else
            os.close(pidfd)
            self._loop.call_soon(self._on_exit, key)
            return
        self._pidfds[key] = pidfd
        self._loop.add_reader(pidfd, self._exited, key)

    def stranger(self, process: Process) -> str | None:
        """Why `process` cannot be one of this user's, as far as can be seen from here. One that is gone is none."""
        if process.pid_namespace != self._namespace or _start_ticks(process.pid) != process.start_ticks:
            return None
        try:
            uid = uid_of(process.pid)
        except OSError:
            return None
        return None if uid == os.geteuid() else f"process {process.pid} belongs to uid {uid}, not to {os.geteuid()}"

    def discard(self, key: Hashable) -> None:
        self._last_seen_s.pop(key, None)
        self._polled.pop(key, None)
        pidfd = self._pidfds.pop(key, None)
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)

    def seen(self, key: Hashable) -> None:
        if key in self._last_seen_s:
            self._last_seen_s[key] = self._now_s()

    def surely_alive(self, key: Hashable) -> bool:
        """The kernel would have told of its death, or it has spoken just now. False says only that nobody knows."""
        seen_s = self._last_seen_s.get(key)
        return seen_s is None or self._now_s() - seen_s < _FRESH_S

    def check_leases(self) -> None:
        now_s = self._now_s()
        for key in [key for key, seen_s in self._last_seen_s.items() if now_s - seen_s > self._lease_s]:
            self._exited(key)
        for key, process in list(self._polled.items()):
            if _start_ticks(process.pid) != process.start_ticks:
                self._exited(key)

    def close(self) -> None:
        for key in [*self._pidfds, *self._polled, *self._last_seen_s]:
            self.discard(key)

    def _exited(self, key: Hashable) -> None:
        self.discard(key)
        self._on_exit(key)


def _start_ticks(pid: int) -> int | None:
    try:
        return process_of(pid).start_ticks
    except OSError:
        return None
