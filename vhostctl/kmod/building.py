"""Building the module against a kernel's headers, in a copy of its sources.

kbuild writes beside the sources (Documentation/kbuild/modules.rst), which may be a checkout that
others build from, or a directory that only root may write to; hence the copy.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from vhostctl.errors import CheckFailed, EnvironmentMissing, InvalidArgument, VhostctlError
from vhostctl.host.module import kernel_release
from vhostctl.kmod import NAME
from vhostctl.kmod.modinfo import ModuleInfo, inspect
from vhostctl.lab import cache, process

_FILE = f"{NAME}.ko"
_COMPILED = shutil.ignore_patterns("*.o", "*.ko", "*.mod", "*.mod.c", ".*", "Module.symvers")

# What kbuild says of its progress; anything else is about the code.
_PROGRESS = re.compile(r"make(\[\d+\])?: |  [A-Z][A-Z0-9]* .*")
# A make that we run must not look for the jobs of one that runs us.
_OTHER_MAKES = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
_NOT_FOR_MAKE = re.compile(r"[\s:#$%=\\'\"]")


def sources() -> Path:
    """Return the module's sources: beside this file where installed, else in the checkout."""
    installed = Path(__file__).with_name("src")
    return installed if installed.is_dir() else Path(__file__).parents[2] / "kmod"


def store() -> Path:
    """Return where the cache keeps built modules, in a directory for each release."""
    return cache.directory() / "modules"


def built() -> list[ModuleInfo]:
    """Return the modules that the cache has."""
    return [inspect(path) for path in sorted(store().glob(f"*/{_FILE}"))]


def running_kernel_dir() -> Path:
    """Return what modules for the running kernel are built with.

    Raises EnvironmentMissing, naming the package, where it is not installed.
    """
    release = kernel_release()
    found = Path("/lib/modules", release, "build")
    if not found.is_dir():
        raise EnvironmentMissing(
            f"{found} is missing: no headers of the running kernel",
            hint=f"apt install linux-headers-{release}, or name another kernel",
        )
    return found


def build(
    kernel_dir: Path,
    into: Path | None = None,
    *,
    strict: bool = False,
    sparse: bool = False,
    log: Callable[[str], object] = lambda _line: None,
) -> ModuleInfo:
    """Build the module for the kernel whose headers `kernel_dir` has, and return its file.

    It is put into the directory `into`, or the cache. `log` gets each line of what the compiler
    said. `strict` asks it for more warnings (W=1) and takes any for a failure, `sparse` has
    sparse read the code as well.

    Raises EnvironmentMissing for a missing program or headers, VhostctlError if the module does
    not build, CheckFailed if it does but `strict` or `sparse` found something.
    """
    make = process.program("make", "apt install make")
    if not (kernel_dir / "Makefile").is_file():
        raise EnvironmentMissing(
            f"{kernel_dir} has no Makefile: no headers of a kernel",
            hint="apt install linux-headers-RELEASE, or vhostctl lab fetch --headers SERIES",
        )
    options = [f"-j{os.cpu_count() or 1}", *(["W=1"] if strict or sparse else [])]
    if sparse:
        process.program("sparse", "apt install sparse")
        options += ["C=2", "CF=-D__CHECK_ENDIAN__"]
    with cache.scratch() as scratch:
        if _NOT_FOR_MAKE.search(f"{scratch}{kernel_dir}"):
            raise InvalidArgument(
                f"make cannot work in {scratch} with {kernel_dir}",
                hint="set VHOSTCTL_CACHE to a directory without blanks and punctuation",
            )
        copy = scratch / "kmod"
        shutil.copytree(sources(), copy, ignore=_COMPILED)
        where = ["-C", str(kernel_dir.resolve()), f"M={copy}"]
        said = _make([make, *where, *options, "modules"], f"{copy}/", kernel_dir, log)
        if said and (strict or sparse):
            raise CheckFailed(f"{kernel_dir.name}: {_cause(said)} ({len(said)} lines in all)")
        return _keep(copy / _FILE, into)


def _make(
    argv: list[str], prefix: str, kernel_dir: Path, log: Callable[[str], object]
) -> list[str]:
    """Run make and return what it said besides its progress; `prefix` is cut out of it."""
    environment = {name: value for name, value in os.environ.items() if name not in _OTHER_MAKES}
    environment |= {"LC_ALL": "C.UTF-8", "PATH": process.search_path()}
    said = []
    with process.owned(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    ) as child:
        complaints = []
        for raw in child.stdout or ():
            line = raw.decode(errors="replace").rstrip().replace(prefix, "")
            if _PROGRESS.match(line) is None:
                said.append(line)
                log(line)
            elif "***" in line:
                complaints.append(line)
        status = child.wait()
    if status != 0:
        raise VhostctlError(
            f"{NAME} does not build against {kernel_dir}: "
            f"{_cause(said or complaints) or f'make ended with {status}'}"
        )
    return said


def _cause(said: list[str]) -> str:
    """Return the line that says most."""

    def about(*words: str) -> Iterator[str]:
        return (line for line in said if any(word in line for word in words))

    return next(about("error:", "ERROR:"), next(about("warning:", "WARNING:"), (said or [""])[0]))


def _keep(module: Path, into: Path | None) -> ModuleInfo:
    into = into or store() / inspect(module).release
    into.mkdir(parents=True, exist_ok=True)
    partial = into / f".{_FILE}.{os.getpid()}"
    try:
        shutil.copyfile(module, partial)
        partial.replace(into / _FILE)
    finally:
        partial.unlink(missing_ok=True)
    return inspect(into / _FILE)
