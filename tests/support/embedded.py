"""Builds of the embedded engine with other compiler options, and programs on them.

The engine is compiled into a folder of the test's own, and this file, run as a program,
puts that folder first on the path of the package `vhostctl.engine`:

    python -m tests.support.embedded FOLDER FILE_OR_MODULE [ARGUMENT...]

so that whatever runs on the installed engine runs on this one: a script, `vhostctl`, pytest.
The interpreter is not built with the sanitizer, so its library is preloaded.
"""

from __future__ import annotations

import functools
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import vhostctl.engine

ROOT = Path(__file__).parents[2]
HOSTILE = "-DVHM_HOSTILE"
PORTABLE = "-DVHM_PORTABLE"
SANITIZERS = {"address,undefined": "libasan.so", "thread": "libtsan.so"}

_CHECKED = [
    "-g",
    "-O1",
    "-fno-omit-frame-pointer",
    "-fno-sanitize-recover=all",
    "-Wno-tsan",  # it does not model fences; every access that they order is atomic
    "-Werror",
]
_ENVIRONMENT = {
    # The interpreter itself keeps memory to its end.
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def build(folder: Path, sanitizers: str = "", *options: str) -> Path:
    """Compile the engine into `folder`, with -fsanitize=`sanitizers` if there are any."""
    checked = [f"-fsanitize={sanitizers}", *_CHECKED] if sanitizers else ["-Werror"]
    command = [sys.executable, "vhostctl/engine/build.py", str(folder), *checked, *options]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(
    folder: Path, sanitizers: str, arguments: Sequence[str], seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a program on the engine in `folder`; a report of a sanitizer is a failure of it."""
    environment = os.environ | _ENVIRONMENT
    if sanitizers:
        environment["LD_PRELOAD"] = library(sanitizers)
    # Some kernels place mappings where the thread sanitizer cannot follow.
    command = ["setarch", "-R", sys.executable, "-m", "tests.support.embedded", str(folder)]
    return subprocess.run(
        [*command, *arguments],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@functools.cache
def library(sanitizers: str) -> str:
    """Return the path of the sanitizers' library, "" if the compiler has none."""
    name = SANITIZERS[sanitizers]
    try:
        found = subprocess.run(
            ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found if Path(found).is_absolute() else ""


def main() -> None:
    folder, target, *arguments = sys.argv[1:]
    vhostctl.engine.__path__.insert(0, f"{folder}/vhostctl/engine")
    sys.argv = [target, *arguments]
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
