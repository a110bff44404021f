"""Device nodes: whether they are there, are what they should be, and let us in."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from vhostctl.doctor import modules
from vhostctl.doctor.access import READ_WRITE, Node, Tag
from vhostctl.doctor.findings import Fault, Finding, error, note
from vhostctl.doctor.system import MIRROR, System
from vhostctl.errors import KernelError
from vhostctl.host.tap import TUN_PATH
from vhostctl.host.vhost import DEFAULT_PATH

KVM_PATH = "/dev/kvm"
_MISC_MAJOR = 10
_MINORS = {"vhost-net": 238, "tun": 200, "kvm": 232}  # linux/miscdevice.h


@dataclass(frozen=True, slots=True)
class _Family:
    """The faults that a node may have, one of each kind."""

    missing: Fault
    type: Fault
    number: Fault
    access: Fault
    nodev: Fault
    cgroup: Fault
    lsm: Fault
    driver: Fault
    open: Fault

    @property
    def all(self) -> tuple[Fault, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)


def _family(prefix: str, node: str, module: str) -> _Family:
    return _Family(
        missing=error(f"{prefix}-MISSING", f"{node} is not there.", f"modprobe {module}"),
        type=error(
            f"{prefix}-TYPE",
            f"{node} is no character device: something wrote a file there.",
            "remove it, and make the node",
        ),
        number=error(
            f"{prefix}-NUMBER",
            f"{node} has the number of another device.",
            "remove it, and make the node",
        ),
        access=error(
            f"{prefix}-ACCESS",
            f"Mode, owner and access control list of {node} do not let this user in.",
            "become a member of the node's group, or run as root",
        ),
        nodev=error(
            f"{prefix}-NODEV",
            f"{node} is on a file system mounted with nodev, where nodes do not open.",
            "mount -o remount,dev the file system",
        ),
        cgroup=error(
            f"{prefix}-CGROUP",
            f"{node} lets this user in, and opening it gives EPERM: the device cgroup does that "
            "(or TOMOYO, or a seccomp filter).",
            "allow the device where the container or unit is defined",
        ),
        lsm=error(
            f"{prefix}-LSM",
            f"{node} lets this user in, and opening it gives EACCES: a security module "
            "(AppArmor, SELinux, Landlock...) does that.",
            "allow it in the profile; `dmesg` or the audit log may name it",
        ),
        driver=error(
            f"{prefix}-DRIVER",
            f"{node} is there and no driver behind it.",
            f"modprobe {module}",
        ),
        open=error(
            f"{prefix}-OPEN",
            f"Opening {node} fails for another reason.",
            "see the evidence",
        ),
    )


NODE = _family("VHOST-NODE", DEFAULT_PATH, "vhost_net")
TUN = _family("VHOST-TUN", TUN_PATH, "tun")
OWNER = error(
    "VHOST-NODE-OWNER",
    "The node opens, and VHOST_SET_OWNER is refused.",
    "see the evidence; ENOMEM is a limit on tasks, ENOTTY another device",
)
KVM_MISSING = note(
    "VHOST-KVM-MISSING",
    "No /dev/kvm: vhostctl does not need it, VMs are emulated without.",
    "modprobe kvm_intel or kvm_amd",
)
KVM_ACCESS = note(
    "VHOST-KVM-ACCESS",
    "/dev/kvm cannot be opened: VMs of this user are emulated.",
    "become a member of the group kvm",
)
FAULTS = (*NODE.all, OWNER, *TUN.all, KVM_MISSING, KVM_ACCESS)


def check_vhost(system: System) -> Iterator[Finding]:
    """Look at the vhost-net node, then own the device."""
    module = "vhost_net" if system.in_tree else MIRROR
    found = next(_check(system, NODE, system.device, module), None)
    if found is not None:
        yield found
    elif system.owning is not None:
        refused = system.owning
        number = refused.errno if isinstance(refused, KernelError) else None
        remedy = {
            errno.ENOMEM: "ulimit -u unlimited  # the worker counts against RLIMIT_NPROC",
            errno.ENOTTY: f"ls -l {shlex.quote(system.device)}  # it is no vhost device",
        }
        yield OWNER.found(str(refused), remedy.get(number or 0, ""))


def check_tun(system: System) -> Iterator[Finding]:
    """Look at /dev/net/tun."""
    yield from _check(system, TUN, TUN_PATH, "tun")


def check_kvm(system: System) -> Iterator[Finding]:
    """Look at /dev/kvm."""
    node = system.node(KVM_PATH)
    if node is None:
        remedy = "modprobe kvm_intel || modprobe kvm_amd"
        yield KVM_MISSING.found(f"{KVM_PATH}: No such file or directory", remedy)
    elif number := system.open_error(KVM_PATH):
        remedy = _way_in(system, KVM_PATH, node) if not system.may_open(node) else ""
        said = f"{_describe(system, KVM_PATH, node)}, opening it gives {_errno(number)}"
        yield KVM_ACCESS.found(said, remedy)


def _check(system: System, family: _Family, path: str, module: str) -> Iterator[Finding]:
    """Yield the one fault that keeps `path`, the node of `module`, from being opened."""
    node = system.node(path)
    wanted = _wanted(system, path)
    if node is None:
        said = f"{path}: No such file or directory"
        if modules.has_driver(system, module) and wanted is not None:
            yield family.missing.found(f"{said}, {module} is there", _make(path, wanted))
        else:
            yield family.missing.found(said, *_load(system, module))
    elif node.number is None:
        remedy = _replace(path, wanted)
        yield family.type.found(f"{path} is no character device (mode {node.mode:04o})", remedy)
    elif wanted is not None and node.number != wanted:
        said = f"{path} is {_colon(node.number)}, the driver is {_colon(wanted)}"
        yield family.number.found(said, _replace(path, wanted))
    elif number := system.open_error(path):
        yield _refused(system, family, path, node, module, number)


def _refused(
    system: System, family: _Family, path: str, node: Node, module: str, number: int
) -> Finding:
    said = f"{_describe(system, path, node)}, opening it gives {_errno(number)}"
    if number in (errno.ENODEV, errno.ENXIO):
        return family.driver.found(said, *_load(system, module))
    if number == errno.EACCES and not system.may_open(node):
        return family.access.found(f"{said}; {_who(system)}", _way_in(system, path, node))
    if number == errno.EACCES and (mount := _nodev(system, path)):
        remedy = f"mount -o remount,dev {shlex.quote(mount)}"
        return family.nodev.found(f"{path}: {mount} is mounted with nodev", remedy)
    if number == errno.EACCES:
        remedy = f"dmesg | grep -iE 'denied|audit' | tail  # then allow {path} in the profile"
        return family.lsm.found(f"{said}; {_security(system)}", remedy)
    if number == errno.EPERM and node.number is not None:
        remedy = (
            f"systemctl set-property UNIT DeviceAllow='{path} rw'  # a container: --device {path}; "
            f"cgroup v1: echo 'c {_colon(node.number)} rw' >devices.allow"
        )
        group = " ".join(system.text("/proc/self/cgroup").split())
        said = f"{said}; /proc/self/cgroup: {group or 'unreadable'}; {_security(system)}"
        return family.cgroup.found(said, remedy)
    return family.open.found(said)


def _load(system: System, module: str) -> tuple[str, tuple[str, ...]]:
    """Return the remedy for a module that is not loaded, and the command if it is safe to run."""
    if module == MIRROR:
        return "vhostctl kmod load", ()
    command = ("modprobe", module)
    if modules.loadable(system, module):
        return " ".join(command), command
    return f"modprobe {module}  # after what keeps it from being loaded is gone", ()


def _wanted(system: System, path: str) -> tuple[int, int] | None:
    """Return the number that the node `path` must have, None if nothing tells."""
    name = path.rpartition("/")[2]
    major, _, minor = system.text(f"/sys/class/misc/{name}/dev").partition(":")
    if major.isdigit() and minor.isdigit():
        return int(major), int(minor)
    return (_MISC_MAJOR, _MINORS[name]) if name in _MINORS else None


def _make(path: str, number: tuple[int, int]) -> str:
    folder, quoted = shlex.quote(os.path.dirname(path)), shlex.quote(path)  # noqa: PTH120
    return f"mkdir -p {folder} && mknod -m 0660 {quoted} c {number[0]} {number[1]}"


def _replace(path: str, number: tuple[int, int] | None) -> str:
    remove = f"rm {shlex.quote(path)}"
    return f"{remove} && {_make(path, number)}" if number else remove


def _describe(system: System, path: str, node: Node) -> str:
    owner = system.name_of("/etc/passwd", node.uid)
    group = system.name_of("/etc/group", node.gid)
    named = [str(entry) for entry in node.acl if entry.tag in (Tag.USER, Tag.GROUP, Tag.MASK)]
    acl = f"ACL {','.join(named)}" if named else "no ACL"
    return f"{path} is {node.mode:04o} {owner}:{group} with {acl}"


def _who(system: System) -> str:
    user = system.name_of("/etc/passwd", system.uid)
    groups = sorted(system.name_of("/etc/group", gid) for gid in system.groups)
    return f"we are {user}, groups {','.join(groups)}"


def _way_in(system: System, path: str, node: Node) -> str:
    """Return the command that lets this user in: membership, if the group may enter, else mode."""
    quoted = shlex.quote(path)
    user = system.name_of("/etc/passwd", system.uid)
    group = system.name_of("/etc/group", node.gid)
    if path == TUN_PATH:
        return f"chmod 0666 {quoted}  # what udev gives it: a tap still needs a capability"
    if system.uid == node.uid:
        return f"chmod u+rw {quoted}"
    if node.acl:
        return f"setfacl -m u:{user}:rw {quoted}"
    if node.gid in system.groups:
        return f"chmod g+rw {quoted}"
    if node.gid != 0 and node.mode >> 3 & READ_WRITE == READ_WRITE:
        if user in _members(system, group):
            return f"newgrp {group}  # {user} was made a member after logging in"
        return f"usermod -aG {group} {user}  # then log in again"
    if "kvm" in _group_names(system):
        more = "" if user in _members(system, "kvm") else f" && usermod -aG kvm {user}"
        return f"chgrp kvm {quoted} && chmod 0660 {quoted}{more}  # then log in again"
    return f"setfacl -m u:{user}:rw {quoted}"


def _group_names(system: System) -> list[str]:
    return [line.partition(":")[0] for line in system.text("/etc/group").splitlines()]


def _members(system: System, group: str) -> list[str]:
    for line in system.text("/etc/group").splitlines():
        fields = line.split(":")
        if len(fields) > 3 and fields[0] == group:
            return fields[3].split(",")
    return []


def _nodev(system: System, path: str) -> str:
    """Return the mount that `path` is on, if it is mounted with nodev, else ""."""
    best, options = "", ""
    for line in system.text("/proc/self/mountinfo").splitlines():
        fields = line.split()
        mount = fields[4].rstrip("/")
        if path.startswith(f"{mount}/") and len(mount) >= len(best):  # a later one lies on top
            best, options = mount, fields[5]
    return (best or "/") if "nodev" in options.split(",") else ""


def _security(system: System) -> str:
    """Return which security modules there are, and under what profile we run."""
    found = [f"security modules {system.text('/sys/kernel/security/lsm') or 'unknown'}"]
    if profile := system.text("/proc/self/attr/current"):
        found.append(f"/proc/self/attr/current: {profile}")
    if system.text("/sys/fs/selinux/enforce") == "1":
        found.append("SELinux enforces")
    return ", ".join(found)


def _colon(number: tuple[int, int]) -> str:
    return f"{number[0]}:{number[1]}"


def _errno(number: int) -> str:
    return errno.errorcode.get(number, str(number))
