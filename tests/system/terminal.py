"""A terminal for a program under test: a real pseudo-terminal, and an emulator that knows what is on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO

import pyte

from tests.system.processes import environment

LEAVES_ALTERNATE_SCREEN = b"\x1b[?1049l"
ENTERS_ALTERNATE_SCREEN = b"\x1b[?1049h"


class Terminal:
    """`async-ckpt-saver words` as the foreground job of a terminal; it is killed if the test leaves it running.
    `stdout`: where the shell was told to send its output instead."""

    def __init__(self, *words: object, columns: int = 100, lines: int = 30, stdout: IO[bytes] | None = None) -> None:
        self.written = b""
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._modes = termios.tcgetattr(self._theirs)
        sized = {name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        variables = sized | {"TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "async_ckpt_saver", *map(str, words)],
            stdin=self._theirs, stdout=stdout or self._theirs, stderr=self._theirs, env=variables,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    @property
    def shown(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    @property
    def cursor_hidden(self) -> bool:
        return bool(self._screen.cursor.hidden)

    @property
    def modes_kept(self) -> bool:
        """Echo, line editing and signals are as they were."""
        return termios.tcgetattr(self._theirs) == self._modes

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def see(self, condition: Callable[[str], bool], what: str, timeout_s: float = 60.0) -> str:
        """The first screen that `condition` is true of. Raises AssertionError with the last one if there is none."""
        deadline_s = time.monotonic() + timeout_s
        while not condition(self.shown):
            assert time.monotonic() < deadline_s, f"not on the screen: {what}\n{self.shown}"
            self._read(0.1)
        return self.shown

    def ended(self) -> int:
        """The exit status, when all that was written has been shown."""
        while self.process.poll() is None:
            self._read(0.1)
        while self._read(0.0):
            pass
        return self.process.returncode

    def _read(self, wait_s: float) -> bool:
        if not select.select([self._ours], [], [], wait_s)[0]:
            return False
        data = os.read(self._ours, 1 << 16)
        self.written += data
        self._stream.feed(data)
        return True
