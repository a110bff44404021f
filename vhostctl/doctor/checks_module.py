"""The modules: there, loaded, forbidden; and the mirror's state."""

from __future__ import annotations

from collections.abc import Iterator

from vhostctl.doctor import modules
from vhostctl.doctor.findings import Finding, error, note, warning
from vhostctl.doctor.system import MIRROR, MIRROR_NODE, System

_MODULE = "vhost_net"
_DISABLED = "/proc/sys/kernel/modules_disabled"
_SIGNED = "/sys/module/module/parameters/sig_enforce"
_LOCKDOWN = "/sys/kernel/security/lockdown"

NOT_LOADED = warning(
    "VHOST-MODULE-NOT-LOADED",
    "vhost_net is there and not loaded; where the node exists, opening it loads the module.",
    "modprobe vhost_net",
)
ABSENT = error(
    "VHOST-MODULE-ABSENT",
    "The running kernel came without vhost_net: neither built in nor among its modules.",
    "install the rest of the kernel's modules, or another kernel",
)
DIRECTORY = error(
    "VHOST-MODULE-DIRECTORY",
    "The running kernel's modules are not there: it was upgraded, or this is a container.",
    "reboot; in a container, load the module outside",
)
BLACKLISTED = warning(
    "VHOST-MODULE-BLACKLISTED",
    "modprobe.d keeps vhost_net from being loaded when the node is opened; by name it still loads.",
    "remove the line, or modprobe vhost_net",
)
INSTALL = error(
    "VHOST-MODULE-INSTALL-FALSE",
    "modprobe.d has modprobe run false or true in place of loading vhost_net or what it needs.",
    "remove the line",
)
COMMAND_LINE = error(
    "VHOST-MODULE-CMDLINE",
    "A kernel parameter forbids vhost_net or what it needs.",
    "remove the parameter and reboot",
)
DISABLED = error(
    "VHOST-MODULE-DISABLED",
    "vhost_net is not loaded, and kernel.modules_disabled forbids it until the next boot.",
    "reboot, and load it earlier: echo vhost_net >/etc/modules-load.d/vhost-net.conf",
)
SIGNED_ONLY = note(
    "VHOST-MODULE-SIGNED-ONLY",
    "The kernel takes signed modules only: its own load, vhost_net_mirror does not.",
    "sign the mirror with a key that the kernel has, or switch Secure Boot off",
)
MIRROR_LOADED = note(
    "VHOST-MIRROR-LOADED",
    "vhost_net_mirror is loaded: the kernel is tainted by it.",
    "vhostctl kmod unload",
)
MIRROR_MISSING = warning(
    "VHOST-MIRROR-NODE",
    "vhost_net_mirror and its node do not go together: one is there without the other.",
    "vhostctl kmod unload; vhostctl kmod load",
)
FAULTS = (
    NOT_LOADED,
    ABSENT,
    DIRECTORY,
    BLACKLISTED,
    INSTALL,
    COMMAND_LINE,
    DISABLED,
    SIGNED_ONLY,
    MIRROR_LOADED,
    MIRROR_MISSING,
)


def check_module(system: System) -> Iterator[Finding]:
    """Look for vhost_net, unless the device is another's or the kernel has it already."""
    if not system.in_tree or modules.has_driver(system, _MODULE):
        return
    yield from _forbidden(system)
    if modules.is_built_in(system, _MODULE):
        return
    folder = system.modules
    path = modules.file(system, _MODULE)
    if not system.exists(folder):
        others = [one for one in system.listing("/lib/modules") if one != system.release]
        said = f"{folder}: No such file or directory"
        if others:
            yield DIRECTORY.found(f"{said}; there is {', '.join(others)}", "reboot")
        else:
            yield DIRECTORY.found(said)
    elif not path:
        said = f"{folder}/modules.dep and modules.builtin do not list vhost_net"
        yield ABSENT.found(said, _package(system))
    elif not system.exists(path):
        yield ABSENT.found(f"modules.dep lists {path}, which is not there", _package(system))
    elif not system.exists(f"/sys/module/{_MODULE}"):
        fix = ("modprobe", _MODULE) if modules.loadable(system, _MODULE) else ()
        yield NOT_LOADED.found(f"/sys/module/{_MODULE} is not there, {path} is", fix=fix)


def _forbidden(system: System) -> Iterator[Finding]:
    """Yield what forbids loading vhost_net."""
    for line in modules.blacklisted(system, _MODULE):
        yield BLACKLISTED.found(str(line), f"sed -i {line.number}d {line.file}")
    for line in modules.refused(system, _MODULE):
        yield INSTALL.found(str(line), f"sed -i {line.number}d {line.file}")
    for option, word in modules.on_command_line(system, _MODULE):
        if option == "module_blacklist":
            yield COMMAND_LINE.found(f"/proc/cmdline: {word}")
        else:
            yield BLACKLISTED.found(f"/proc/cmdline: {word}", f"modprobe {_MODULE}")
    if system.number(_DISABLED):
        yield DISABLED.found(f"{_DISABLED}: {system.number(_DISABLED)}")


def check_signatures(system: System) -> Iterator[Finding]:
    """Tell whether modules of our own can be loaded."""
    level = system.text(_LOCKDOWN).partition("[")[2].partition("]")[0]
    if level not in ("", "none"):
        yield SIGNED_ONLY.found(f"{_LOCKDOWN}: {level}")
    elif system.text(_SIGNED) == "Y":
        remedy = "boot without module.sig_enforce, or sign the mirror with a key the kernel has"
        yield SIGNED_ONLY.found(f"{_SIGNED}: Y", remedy)


def check_mirror(system: System) -> Iterator[Finding]:
    """Tell whether the mirror is loaded, and whether its node goes with it."""
    loaded = modules.is_loaded(system, MIRROR)
    node = system.exists(MIRROR_NODE)
    if loaded:
        folder = f"/sys/module/{MIRROR}"
        yield MIRROR_LOADED.found(f"{folder}/taint: {system.text(f'{folder}/taint') or 'none'}")
    if loaded and not node:
        yield MIRROR_MISSING.found(f"{MIRROR} is loaded, {MIRROR_NODE} is not there")
    if node and not loaded:
        yield MIRROR_MISSING.found(f"{MIRROR_NODE} is there, {MIRROR} is not", f"rm {MIRROR_NODE}")


def _package(system: System) -> str:
    """Return how this distribution installs the missing part of a kernel's modules."""
    release, like = system.release, system.distribution
    if "ubuntu" in like:
        return f"apt install linux-modules-extra-{release}"
    if "debian" in like:
        return "apt install linux-image-amd64 && reboot"
    if like & {"fedora", "rhel"}:
        return f"dnf install kernel-modules-{release}"
    if like & {"suse", "opensuse"}:
        return "zypper install kernel-default && reboot"
    return ""
