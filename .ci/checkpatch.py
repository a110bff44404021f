"""`make lint-c`: the kernel's checkpatch over the module's C files.

Debian has the script in the kernel's source package only, so three files of it are kept in the
lab's cache.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vhostctl.lab import apt, cache

SOURCE = Path(__file__).parents[1] / "kmod"
PACKAGE = "linux-source-6.1"
FILES = ("checkpatch.pl", "spelling.txt", "const_structs.checkpatch")
OPTIONS = ("--no-tree", "--strict", "--terse", "--show-types", "--no-summary")

# compat.h is where versions are compared, macros of port_native.h jump to where a fault is handled,
# and trace.h is laid out as the kernel's own are.
IGNORED = {
    "compat.h": "LINUX_VERSION_CODE,CONSTANT_COMPARISON",
    "port_native.h": "MACRO_WITH_FLOW_CONTROL,SPACING",
    "trace.h": "OPEN_ENDED_LINE,PARENTHESIS_ALIGNMENT",
}


def script() -> Path:
    """Return checkpatch in the cache; it appears there by a rename, so it is whole."""
    place = cache.directory() / "checkpatch"
    if not place.exists():
        with cache.scratch() as scratch:
            fetch(scratch).rename(place)
    return place / FILES[0]


def fetch(scratch: Path) -> Path:
    """Return a directory with the files, from the source package."""

    def quiet(_what: str, _percent: float) -> None:
        return

    source = apt.PrivateApt(scratch / "apt", apt.machine_archives().sources("bookworm"))
    source.update(quiet)
    (package,) = source.download([source.package(PACKAGE)], scratch, quiet)
    files = scratch / "scripts"
    files.mkdir()
    # 140 MB that hold 1.3 GB: never unpacked as a whole.
    wanted = [f"{PACKAGE}/scripts/{name}" for name in FILES]
    unpack = f'dpkg-deb --fsys-tarfile "$1" | tar -xO ./usr/src/{PACKAGE}.tar.xz | tar -xJ -C "$2"'
    command = ["sh", "-ec", f"{unpack} --strip-components=2 {' '.join(wanted)}", "sh"]
    subprocess.run([*command, package, files], check=True)
    return files


def main() -> int:
    """Check every file, and return 1 if one was found wanting."""
    checkpatch = script()
    failed = False
    for file in sorted(
        path for part in ("core", "linux") for path in SOURCE.glob(f"{part}/*.[ch]")
    ):
        options = [*OPTIONS, "--max-line-length=100"]
        if file.name in IGNORED:
            options += ["--ignore", IGNORED[file.name]]
        done = subprocess.run(["perl", checkpatch, *options, "--file", file], check=False)
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
