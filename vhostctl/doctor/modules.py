"""What modprobe would do with a module: is it there, is it loaded, does something forbid it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vhostctl.doctor.system import System

# In modprobe.d(5)'s order: a file hides those of its name in later folders.
_FOLDERS = (
    "/etc/modprobe.d",
    "/run/modprobe.d",
    "/usr/local/lib/modprobe.d",
    "/usr/lib/modprobe.d",
    "/lib/modprobe.d",
)
_REFUSALS = {"false", "true", ":"}
_NODES = {"vhost_net": "vhost-net", "tun": "tun", "vhost_net_mirror": "vhost-net-mirror"}


@dataclass(frozen=True, slots=True)
class Line:
    """A line of modprobe's configuration that forbids something, and where it stands."""

    file: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.text}"


def is_loaded(system: System, name: str) -> bool:
    """Return whether the kernel has the module `name`, loaded or built in."""
    return system.exists(f"/sys/module/{name}")


def has_driver(system: System, name: str) -> bool:
    """Return whether the device of `name` is registered, or the module at least there."""
    return system.exists(f"/sys/class/misc/{_NODES.get(name, name)}") or is_loaded(system, name)


def is_built_in(system: System, name: str) -> bool:
    """Return whether modules.builtin lists `name`."""
    lines = system.text(f"{system.modules}/modules.builtin").splitlines()
    return any(_name(line) == name for line in lines)


def file(system: System, name: str) -> str:
    """Return the file of the module `name` as modules.dep has it; "" if it is not listed."""
    for line in system.text(f"{system.modules}/modules.dep").splitlines():
        path = line.partition(":")[0]
        if _name(path) == name:
            return f"{system.modules}/{path}"
    return ""


def needed(system: System, name: str) -> list[str]:
    """Return `name` and the modules that modules.dep says it needs."""
    for line in system.text(f"{system.modules}/modules.dep").splitlines():
        path, _, others = line.partition(":")
        if _name(path) == name:
            return [name, *(_name(other) for other in others.split())]
    return [name]


def blacklisted(system: System, name: str) -> Iterator[Line]:
    """Yield the lines that keep `name` from being loaded when its node is opened."""
    for line in _configuration(system):
        words = line.text.split()
        if words[0] == "blacklist" and _plain(words[1:2]) == name:
            yield line


def refused(system: System, name: str) -> Iterator[Line]:
    """Yield the lines that have modprobe run nothing in place of loading `name`, or its needs."""
    names = needed(system, name)
    for line in _configuration(system):
        words = line.text.split()
        if words[0] != "install" or _plain(words[1:2]) not in names:
            continue
        if words[2:] and words[2].rpartition("/")[2] in _REFUSALS:
            yield line


def loadable(system: System, name: str) -> bool:
    """Return whether `modprobe name` may be tried: nobody has said that they do not want it."""
    forbidden = [*blacklisted(system, name), *refused(system, name), *on_command_line(system, name)]
    path = file(system, name)
    return not forbidden and bool(path) and system.exists(path)


def on_command_line(system: System, name: str) -> Iterator[tuple[str, str]]:
    """Yield the kernel parameters that forbid `name`: module_blacklist, modprobe.blacklist."""
    for word in system.text("/proc/cmdline").split():
        option, _, value = word.partition("=")
        if option in ("module_blacklist", "modprobe.blacklist"):
            names = {_plain([one]) for one in value.split(",")}
            if names & set(needed(system, name)):
                yield option, word


def _configuration(system: System) -> Iterator[Line]:
    seen: set[str] = set()
    for folder in _FOLDERS:
        for name in system.listing(folder):
            if name.endswith(".conf") and name not in seen:
                seen.add(name)
                for number, text in enumerate(system.text(f"{folder}/{name}").splitlines(), 1):
                    if text.split() and not text.lstrip().startswith("#"):
                        yield Line(f"{folder}/{name}", number, text.strip())


def _name(path: str) -> str:
    return _plain([path.rpartition("/")[2].partition(".ko")[0]])


def _plain(words: list[str]) -> str:
    """Return a module's name with underscores: both ways of writing it are the same."""
    return words[0].replace("-", "_") if words else ""
