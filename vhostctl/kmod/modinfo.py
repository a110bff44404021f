"""What a module file says of itself, read by modinfo(8)."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from vhostctl.errors import InvalidArgument
from vhostctl.lab import process


@dataclass(frozen=True)
class ModuleInfo:
    """A module file; a field that it lacks is empty.

    `vermagic` begins with the release of the kernel that it is for, `depends` are the modules
    that have to be loaded before, `parameters` the names of what may be set.
    """

    path: Path
    name: str
    vermagic: str
    version: str
    srcversion: str
    depends: tuple[str, ...]
    parameters: tuple[str, ...]

    @property
    def release(self) -> str:
        """The release of the kernel that the module is for."""
        return self.vermagic.partition(" ")[0]


def inspect(module: Path | str) -> ModuleInfo:
    """Return what the file of a module says, or the installed one of that name.

    Raises InvalidArgument for a file that is no module, and for a name that is not installed.
    """
    modinfo = process.program("modinfo", "apt install kmod")
    try:
        text = process.output_of([modinfo, str(module)])
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["it is no module"])[-1]
        raise InvalidArgument(f"{module}: {said.removeprefix('modinfo: ERROR: ')}") from error
    fields: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key, []).append(value.strip())
    first = {key: values[0] for key, values in fields.items()}
    return ModuleInfo(
        Path(first.get("filename", str(module))),
        first.get("name", ""),
        first.get("vermagic", ""),
        first.get("version", ""),
        first.get("srcversion", ""),
        tuple(first.get("depends", "").split(",")) if first.get("depends") else (),
        tuple(value.partition(":")[0] for value in fields.get("parm", [])),
    )
