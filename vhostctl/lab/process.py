"""Child processes that do not outlive the thread that started them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from vhostctl.errors import EnvironmentMissing

# Where a distribution keeps administrators' programs; not on every user's PATH.
SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def search_path() -> str:
    """Return $PATH followed by the system directories that it lacks."""
    path = os.environ.get("PATH", os.defpath)
    known = path.split(os.pathsep)
    return os.pathsep.join([path, *(d for d in SYSTEM_DIRECTORIES if d not in known)])


def program(name: str, hint: str) -> str:
    """Return the path of a program, or raise EnvironmentMissing with `hint`."""
    path = shutil.which(name, path=search_path())
    if path is None:
        raise EnvironmentMissing(f"{name} is not installed", hint=hint)
    return path


@contextlib.contextmanager
def owned(argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start `argv` for the length of the block; `options` are Popen's.

    It is killed when the block ends, and by the kernel when the thread that started it dies,
    whatever killed that.
    """
    wrapper = [program("setpriv", "apt install util-linux"), "--pdeathsig", "KILL", "--"]
    with subprocess.Popen([*wrapper, *argv], **options) as child:
        try:
            yield child
        finally:
            child.kill()


def output_of(argv: Sequence[str]) -> str:
    """Run `argv` without input and return its stdout.

    Raises subprocess.CalledProcessError with `stderr` when it fails.
    """
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    locale = {"LC_ALL": "C.UTF-8", "PATH": search_path()}
    with owned(argv, stdout=subprocess.PIPE, env=os.environ | locale, **streams) as child:
        output, complaint = child.communicate()
    text = output.decode(errors="replace")
    if child.returncode != 0:
        raise subprocess.CalledProcessError(
            child.returncode, list(argv), text, complaint.decode(errors="replace")
        )
    return text
