"""What state the module is in, as /sys/module and /proc tell it."""

from __future__ import annotations

import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vhostctl.host import module
from vhostctl.kmod import NAME, NODE

_SYS_MODULE = Path("/sys/module") / NAME
_NODE = Path(NODE)
_PROC = Path("/proc")
_TAINTED = Path("/proc/sys/kernel/tainted")


@dataclass(frozen=True)
class Status:
    """The module in the running kernel.

    Fields that only a loaded module has are empty without: `version`, `srcversion`, `taint`
    (letters, Documentation/admin-guide/tainted-kernels.rst), `parameters`, `references`,
    `holders` (modules that need it) and `users` (processes with the node open, and their names,
    as far as we may see). `node` is whether /dev has it, `tainted` the kernel's own bits.
    """

    kernel: str
    loaded: bool
    version: str
    srcversion: str
    parameters: dict[str, str]
    references: int
    holders: tuple[str, ...]
    users: tuple[tuple[int, str], ...]
    taint: str
    tainted: int
    node: bool


def status() -> Status:
    """Return the state of the module."""
    return Status(
        kernel=module.kernel_release(),
        loaded=is_loaded(),
        version=_attribute("version"),
        srcversion=_attribute("srcversion"),
        parameters=module.parameters(NAME),
        references=reference_count(),
        holders=holders(),
        users=users(),
        taint=_attribute("taint"),
        tainted=int(_TAINTED.read_text(encoding="ascii")),
        node=_device_number(_NODE) is not None,
    )


def is_loaded() -> bool:
    """Return whether the running kernel has the module."""
    return _SYS_MODULE.is_dir()


def reference_count() -> int:
    """Return how many things keep the module from being unloaded."""
    return int(_attribute("refcnt") or 0)


def holders() -> tuple[str, ...]:
    """Return the modules that need it."""
    with suppress(FileNotFoundError):
        return tuple(sorted(path.name for path in (_SYS_MODULE / "holders").iterdir()))
    return ()


def users() -> tuple[tuple[int, str], ...]:
    """Return the processes that have the node open, as far as we may see, and their names."""
    number = _device_number(_NODE)
    found = {}
    for descriptor in _PROC.glob("[0-9]*/fd/*") if number is not None else ():
        if _device_number(descriptor) == number:
            process = descriptor.parents[1]
            with suppress(OSError):  # it ended meanwhile
                found[int(process.name)] = (process / "comm").read_text(errors="replace").strip()
    return tuple(sorted(found.items()))


def _device_number(path: Path) -> int | None:
    """Return the number of a character device, None for anything else or not ours to look at."""
    with suppress(OSError):
        about = path.stat()
        return about.st_rdev if stat.S_ISCHR(about.st_mode) else None
    return None


def _attribute(name: str) -> str:
    with suppress(FileNotFoundError):
        return (_SYS_MODULE / name).read_text(encoding="utf-8").strip()
    return ""
