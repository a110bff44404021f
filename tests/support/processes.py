"""What a test has of a process that it started, and of the socket that one listens on."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import AnyStr


@contextmanager
def ended(process: subprocess.Popen[AnyStr]) -> Iterator[subprocess.Popen[AnyStr]]:
    """End the process with the block: `with Popen` waits for one that a failed test left."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def reached(client: socket.socket, path: Path) -> bool:
    """Connect, or return False: a socket is there a moment before somebody listens on it."""
    try:
        client.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def listens(path: Path) -> bool:
    """Return whether a connection to the stream socket at `path` is taken."""
    with socket.socket(socket.AF_UNIX) as probe:
        return reached(probe, path)
