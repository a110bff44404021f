"""A shell on a guest's serial console: commands with their status and output."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import threading
import time
from typing import Self

PROMPT = rb"/ # "
_LONGEST = 1000  # busybox's line editor takes 1024


class ConsoleSilent(AssertionError):
    """What was waited for did not come; the message holds all that the console said."""


class Console:
    """The console behind two descriptors, which stay the caller's; a context manager.

    A thread reads all that comes, so that the guest never waits for us.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._token = secrets.token_hex(3)
        self._number = 0
        self._said = bytearray()
        self._at = 0  # up to here it was looked at
        self._ended = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="console", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the thread: whatever writes to the console must have ended."""
        self._thread.join(20)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._read_fd, 1 << 16)
            except OSError:  # the other end of a pty was closed
                data = b""
            with self._news:
                self._said += data
                self._ended = not data
                self._news.notify_all()
                if not data:
                    return

    @property
    def text(self) -> str:
        """All that the console said."""
        with self._news:
            return self._said.decode(errors="replace").replace("\r", "")

    def wait_for(self, pattern: bytes, timeout: float) -> re.Match[bytes]:
        """Return the first match after the one before. Raises ConsoleSilent."""
        expression = re.compile(pattern, re.DOTALL)
        deadline = time.monotonic() + timeout
        with self._news:
            while (match := expression.search(bytes(self._said[self._at :]))) is None:
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    why = "the console ended" if self._ended else f"not within {timeout} s"
                    raise ConsoleSilent(
                        f"{why}: {pattern!r}\n{self._said.decode(errors='replace')}"
                    )
                self._news.wait(left)
            self._at += match.end()
        return match

    def log_in(self, timeout: float) -> None:
        """Wait for the shell, and have the kernel keep its messages out of what follows."""
        self.wait_for(PROMPT, timeout)
        self.check("dmesg -n 1", timeout)

    def write(self, text: str) -> None:
        """Type something."""
        data = text.encode()
        while data:
            data = data[os.write(self._write_fd, data) :]

    def run(self, command: str, timeout: float) -> tuple[int, str]:
        """Return the exit status and the output of a command once the prompt is back.

        The marks around the output are typed in pieces, so that the echo of what was typed
        has none of them, however the shell wraps it.
        """
        self._number += 1
        mark = f"{self._token}.{self._number}"
        line = f"echo '<''{mark}>'; eval {shlex.quote(command)}; echo '<'/{mark}:$?'>'\n"
        assert len(line) < _LONGEST, "too long for the shell"
        self.write(line)
        name = re.escape(mark).encode()
        match = self.wait_for(rb"<%s>\r*\n(.*?)</%s:(\d+)>.*?%s" % (name, name, PROMPT), timeout)
        return int(match[2]), match[1].decode(errors="replace").replace("\r", "")

    def check(self, command: str, timeout: float) -> str:
        """Return the output of a command that must succeed."""
        status, output = self.run(command, timeout)
        assert status == 0, f"{command}: exit status {status}\n{output}\n{self.text}"
        return output
