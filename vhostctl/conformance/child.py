"""A function in a process of its own, in a network namespace of its own, within a bound."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from vhostctl.errors import VhostctlError
from vhostctl.host import netns

_GRACE = 10.0  # seconds that a killed process may take to be gone


class ChildError(VhostctlError):
    """The function did not come to its end."""


def call(function: Callable[[], object], seconds: float) -> Any:
    """Return what `function` returned in a forked child, as JSON says it.

    The child has a fresh network namespace. Call it from a process with one thread only.
    Raises ChildError: an exception, death by a signal, or no end within `seconds`.
    """
    reader, writer = os.pipe()
    try:
        child = os.fork()
        if child == 0:
            _serve(function, writer, seconds)
        os.close(writer)
        return _outcome(child, reader, seconds)
    finally:
        os.close(reader)


def _serve(function: Callable[[], object], writer: int, seconds: float) -> NoReturn:
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(math.ceil(seconds + _GRACE))  # the parent may be gone by then
        try:
            netns.unshare()
            answer = {"value": function()}
        except Exception as error:  # noqa: BLE001 -- it is the parent's to judge
            answer = {"error": f"{type(error).__name__}: {error}{_place(error)}"}
        with open(writer, "wb") as pipe:
            pipe.write(json.dumps(answer).encode() + b"\n")
        os._exit(0)
    finally:
        os._exit(1)


def _place(error: Exception) -> str:
    """Say which lines of this package's cases the error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "/cases/" in f.filename]
    return f" ({', '.join(places)})" if places else ""


def _outcome(child: int, reader: int, seconds: float) -> Any:
    """Wait for the child's answer and its end, and end it whatever happens."""
    deadline = time.monotonic() + seconds
    pidfd = os.pidfd_open(child)
    try:
        answer = _read_line(reader, deadline)
        ended = _readable(pidfd, deadline)
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        gone = _readable(pidfd, time.monotonic() + _GRACE)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if gone else 0
        os.close(pidfd)
    if not gone:
        raise ChildError(f"process {child} is still there after SIGKILL: the kernel holds it")
    if not ended:
        raise ChildError(f"no end within {seconds:g} s")
    if status < 0:
        raise ChildError(f"ended by {signal.Signals(-status).name}")
    if not answer.endswith(b"\n"):
        raise ChildError(f"ended with status {status} and no answer")
    result = json.loads(answer)
    if "error" in result:
        raise ChildError(result["error"])
    return result["value"]


def _read_line(reader: int, deadline: float) -> bytes:
    """Read up to the end of the line: other processes may hold the pipe open after it."""
    data = b""
    while not data.endswith(b"\n") and _readable(reader, deadline):
        part = os.read(reader, 65536)
        if not part:
            break
        data += part
    return data


def _readable(fd: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0, math.ceil((deadline - time.monotonic()) * 1000))))
