"""Builds of the driver half with other compiler options, and tests on them.

The module is compiled into a folder of the test's own, and this file, run as a program, puts
that folder first on the path of the package `vhostctl.guest`:

    python -m tests.support.guest_build FOLDER PYTEST_ARGUMENT...

`tests.support.embedded` does the same for the engine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import vhostctl.guest
from tests.support import embedded


def build(folder: Path, *options: str) -> Path:
    """Compile the driver half into `folder`."""
    command = [sys.executable, "vhostctl/guest/build.py", str(folder), "-Werror", *options]
    done = subprocess.run(
        command, check=False, cwd=embedded.ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(
    folder: Path, arguments: Sequence[str], environment: dict[str, str], seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run pytest on the driver half in `folder`."""
    command = [sys.executable, "-m", "tests.support.guest_build", str(folder), *arguments]
    return subprocess.run(
        command,
        check=False,
        cwd=embedded.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def main() -> int:
    folder, *arguments = sys.argv[1:]
    vhostctl.guest.__path__.insert(0, f"{folder}/vhostctl/guest")
    return int(pytest.main(["-p", "no:cacheprovider", *arguments]))


if __name__ == "__main__":
    sys.exit(main())
