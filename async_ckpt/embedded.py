"""The embedded saver: one a host and directory, started by whichever rank needs it first, shared by all of them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time

from async_ckpt.core.endpoints import embedded_endpoint, embedded_home
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.location import Location
from async_ckpt.core.private import private_directory

_START_TIMEOUT_S = 30.0
_POLL_S = 0.002
_LOG_LIMIT_BYTES = 1 << 20


class EmbeddedSaver:
    """Every process of this user on this host that names the same directory gets the same saver.

    It lives in a session of its own, so it outlives a killed trainer, finishes what is staged, and exits by itself.
    """

    def __init__(self, directory: Location, second: Location | None = None) -> None:
        """`directory` is absolute, or a URL; so is `second`, to which it uploads.

        Raises CheckpointError if the socket's directory is someone else's.
        """
        self._home = embedded_home(directory)
        private_directory(self._home.parent)
        private_directory(self._home)
        self._roots = [directory] if second is None else [directory, second]
        self.endpoint = embedded_endpoint(directory)
        self.log_path = self._home / "saver.log"

    def alive(self) -> bool:
        """Whether a saver holds the endpoint's lock."""
        try:
            lock = os.open(self._home / "saver.sock.lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    @property
    def which(self) -> str:
        """The saver that holds the lock, for people: it wrote its pid down there."""
        try:
            pid = (self._home / "saver.sock.lock").read_text().strip()
        except OSError:
            pid = ""
        return f"with pid {pid or 'unknown'} (a stopped one goes on after `kill -CONT`; log: {self.log_path})"

    def ensure(self) -> None:
        """Return when a saver is there. Of many ranks that ask at once, one starts it and the others wait.

        Raises CheckpointError with the end of the saver's log if it does not come up, or if its own files cannot be
        made.
        """
        try:
            self._ensure()
        except OSError as error:
            raise CheckpointError(
                f"no saver can be started, its files in {self._home} cannot be made ({error}): free some space there, "
                f"or set TMPDIR to a directory that can be written to"
            ) from error

    def _ensure(self) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self.alive():
            private_directory(self._home)  # a tidy machine may have removed it
            starting = os.open(self._home / "starting.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(starting, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self.alive():
                    self._start(deadline_s)
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise self._failed() from None
                time.sleep(_POLL_S)
            finally:
                os.close(starting)

    def _start(self, deadline_s: float) -> None:
        command = [sys.executable, "-m", "async_ckpt_saver", "run", "--embedded", "--detach",
                   "--bind", self.endpoint]  # fmt: skip
        for root in self._roots:
            command += ["--root", str(root)]
        if self.log_path.exists() and self.log_path.stat().st_size > _LOG_LIMIT_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            subprocess.run(
                command,
                cwd="/",
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
                timeout=_START_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise self._failed() from error
        finally:
            os.close(log)
        while not self.alive():
            if time.monotonic() > deadline_s:
                raise self._failed()
            time.sleep(_POLL_S)

    def _failed(self) -> CheckpointError:
        try:
            tail = self.log_path.read_text(errors="replace")[-2000:]
        except OSError:
            tail = ""
        return CheckpointError(f"the embedded saver did not come up; its log is {self.log_path} and ends with:\n{tail}")


def _environment() -> dict[str, str]:
    """Ours, with paths that are still right in another working directory."""
    environment = dict(os.environ)
    if "PYTHONPATH" in environment:
        paths = environment["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths)
    return environment
