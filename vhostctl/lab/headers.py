"""What modules for a kernel are built with, in the cache: Debian's headers, usable where they lie.

They are a directory named after the release below ``headers`` in the cache: the unpacked
linux-headers and linux-kbuild packages, changed so that ``make -C`` works there. The packages
assume three things that do not hold for a kernel of another suite: that they lie in /usr/src, that
the suite's compiler is installed, and that its libc is. It appears by a rename, so one that exists
is whole.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from vhostctl.errors import EnvironmentMissing
from vhostctl.lab import apt, cache
from vhostctl.lab.apt import Package

# The headers come in two parts; kbuild's programs need the libraries, but for those that sign.
_PART = re.compile(r"linux-headers-.*-common|linux-kbuild-.*|libc6|libelf1(t64)?|libzstd1|zlib1g")

# What a kernel was built with and a module need not be. Both files of the configuration lose them:
# they say what an older compiler does not understand, and change no layout.
_NEWER_COMPILER = (
    "CC_HAS_ASSUME",
    "CC_HAS_COUNTED_BY",
    "CC_HAS_COUNTED_BY_PTR",
    "CC_HAS_MIN_FUNCTION_ALIGNMENT",
    "CC_HAS_MULTIDIMENSIONAL_NONSTRING",
)
# This one decides the layout of struct module in C, so only make must not know it: type
# information for a module needs pahole and the kernel's own, and nothing here reads it.
_TYPE_INFORMATION = "DEBUG_INFO_BTF_MODULES"

_VARIABLES = """
CC := $(or $(shell command -v $(CC)),$(CROSS_COMPILE)gcc)
override CONFIG_PAHOLE_VERSION = $(PAHOLE_VERSION)
"""
_HERE = "HEADERS := $(realpath $(dir $(lastword $(MAKEFILE_LIST)))..)\n"

# Debian 12 keeps some libraries in /lib, some in /usr/lib.
_WRAPPER = """\
#!/bin/sh
root="${{0%/*}}/{up}"
lib="$root/lib/x86_64-linux-gnu"
exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib:$root/usr/lib/x86_64-linux-gnu" \\
	--argv0 "$0" "$0.elf" "$@"
"""


def place(release: str) -> Path:
    """Return where the cache has, or would have, the headers of a release."""
    return cache.directory() / "headers" / release


def find(release: str) -> Path:
    """Return the directory for ``make -C``; EnvironmentMissing if it was not fetched."""
    found = _build_directory(place(release), release)
    if not found.is_dir():
        series = ".".join(release.split(".")[:2])
        raise EnvironmentMissing(
            f"the headers of kernel {release} are not in {cache.directory()}",
            hint=f"run vhostctl lab fetch --headers {series}",
        )
    return found


def resolve(package: Callable[[str], Package], release: str) -> list[Package]:
    """Return the packages that modules for a kernel are built with.

    `package` looks one up by name.
    """
    return apt.closure(package, [f"linux-headers-{release}"], _PART)


def settle(tree: Path, release: str) -> None:
    """Make the unpacked packages work where they lie, on this machine.

    Raises EnvironmentMissing if they hold no headers of the release.
    """
    build = _build_directory(tree, release)
    if not (build / "Makefile").is_file():
        raise EnvironmentMissing(f"the packages hold no headers of kernel {release}")
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    shutil.rmtree(tree / "usr" / "share", ignore_errors=True)
    (build / "vmlinux").unlink(missing_ok=True)  # only its type information
    makefile = (build / "Makefile").read_text(encoding="utf-8")
    makefile = _HERE + makefile.replace("/usr/src/", "$(HEADERS)/")
    (build / "Makefile").write_text(makefile, encoding="utf-8")
    with open(build / ".kernelvariables", "a", encoding="utf-8") as variables:
        variables.write(_VARIABLES)
    _drop(build / "include/config/auto.conf", (*_NEWER_COMPILER, _TYPE_INFORMATION))
    _drop(build / "include/generated/autoconf.h", _NEWER_COMPILER)
    _wrap_programs(tree)


def _build_directory(tree: Path, release: str) -> Path:
    return tree / "usr" / "src" / f"linux-headers-{release}"


def _drop(path: Path, options: tuple[str, ...]) -> None:
    """Remove options from a file of the kernel's configuration, for make or for C."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    gone = re.compile(rf"(#define )?CONFIG_({'|'.join(options)})[ =].*\n")
    path.write_text("".join(line for line in lines if not gone.fullmatch(line)), encoding="utf-8")


def _wrap_programs(tree: Path) -> None:
    """Let kbuild's programs run with the libraries that they were linked with.

    A program keeps its name in argv[0]: modpost and objtool look beside it for the variant
    that fits the target.
    """
    for path in sorted((tree / "usr" / "lib").glob("linux-kbuild-*/**/*")):
        if path.is_symlink() or not path.is_file() or not _is_program(path):
            continue
        path.rename(path.with_name(f"{path.name}.elf"))
        up = "/".join([".."] * (len(path.relative_to(tree).parts) - 1))
        path.write_text(_WRAPPER.format(up=up), encoding="utf-8")
        path.chmod(0o755)


def _is_program(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"
