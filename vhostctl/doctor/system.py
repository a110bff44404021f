"""The machine as the checks see it: its files below a root, and what is tried on it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from vhostctl.doctor.access import Node, may_open, parse_acl
from vhostctl.errors import VhostctlError
from vhostctl.host.vhost import DEFAULT_PATH, VhostNet

# linux/capability.h
CAP_DAC_OVERRIDE = 1
CAP_NET_ADMIN = 12
CAP_SYS_MODULE = 16
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24
CAP_BPF = 39

MIRROR = "vhost_net_mirror"
MIRROR_NODE = "/dev/vhost-net-mirror"
_UNMAPPED = 65534  # kernel.overflowuid: an owner that a user namespace does not know


class System:
    """One look at a machine for `device`, a node; what it finds is kept, so make one for each look.

    Names of files are absolute and looked up below `root`. The five methods at the end try
    something instead of reading about it.
    """

    def __init__(self, device: str = DEFAULT_PATH, root: Path = Path("/")) -> None:
        self.device = device
        self.root = root

    @property
    def in_tree(self) -> bool:
        """Whether `device` is served by the kernel's own vhost_net."""
        return self.device != MIRROR_NODE

    def path(self, name: str) -> Path:
        """Return where the file `name` is."""
        return self.root / name.lstrip("/")

    def exists(self, name: str) -> bool:
        """Return whether there is such a file, as far as we may see."""
        return os.path.lexists(self.path(name))

    def text(self, name: str) -> str:
        """Return what a file holds, without the last line break; "" if it cannot be read."""
        with suppress(OSError):
            return self.path(name).read_text(encoding="utf-8", errors="replace").rstrip("\n\0")
        return ""

    def number(self, name: str) -> int | None:
        """Return the number that a file holds, None if there is none."""
        with suppress(ValueError):
            return int(self.text(name))
        return None

    def listing(self, name: str) -> list[str]:
        """Return the names in a folder, sorted; none if it cannot be read."""
        with suppress(OSError):
            return sorted(path.name for path in self.path(name).iterdir())
        return []

    @cached_property
    def release(self) -> str:
        """The kernel's release, as `uname -r` prints it."""
        return self.text("/proc/sys/kernel/osrelease")

    @cached_property
    def modules(self) -> str:
        """The folder with the running kernel's modules."""
        return f"/lib/modules/{self.release}"

    @cached_property
    def distribution(self) -> set[str]:
        """The distribution and those that it is like, such as {"ubuntu", "debian"}."""
        lines = self.text("/etc/os-release").splitlines()
        values = [line.partition("=")[2] for line in lines if line.startswith(("ID=", "ID_LIKE="))]
        return {word for value in values for word in value.strip("\"'").split()}

    @cached_property
    def status(self) -> dict[str, list[str]]:
        """/proc/self/status: the words of each line by its name."""
        lines = (line.partition(":") for line in self.text("/proc/self/status").splitlines())
        return {name: value.split() for name, _, value in lines}

    @property
    def uid(self) -> int:
        """The effective user."""
        return int(self.status["Uid"][1])

    @property
    def real_uid(self) -> int:
        """The real user, whom tasks count for."""
        return int(self.status["Uid"][0])

    @property
    def groups(self) -> set[int]:
        """The effective group and the supplementary ones."""
        return {int(self.status["Gid"][1]), *map(int, self.status.get("Groups", ()))}

    def has(self, capability: int) -> bool:
        """Return whether the effective set holds a capability."""
        return bool(int(self.status["CapEff"][0], 16) >> capability & 1)

    @cached_property
    def in_user_namespace(self) -> bool:
        """Whether we are in a user namespace other than the first."""
        name = "/proc/self/uid_map"  # empty until somebody writes the map of a new one
        return self.exists(name) and self.text(name).split() != ["0", "0", "4294967295"]

    def limit(self, name: str) -> int | None:
        """Return a soft limit by its name in /proc/self/limits; None for unlimited."""
        for line in self.text("/proc/self/limits").splitlines():
            if line.startswith(name):
                value = line.removeprefix(name).split()[0]
                return None if value == "unlimited" else int(value)
        return None

    def name_of(self, table: str, identity: int) -> str:
        """Return the name of a user (/etc/passwd) or group (/etc/group), or the number."""
        for line in self.text(table).splitlines():
            fields = line.split(":")
            if len(fields) > 2 and fields[2] == str(identity):
                return fields[0]
        return str(identity)

    def may_open(self, node: Node) -> bool:
        """Return whether owner, mode and list of a node let us open it for reading and writing."""
        unmapped = self.in_user_namespace and _UNMAPPED in (node.uid, node.gid)
        if self.has(CAP_DAC_OVERRIDE) and not unmapped:
            return True
        return may_open(node, self.uid, self.groups)

    def node(self, name: str) -> Node | None:
        """Return what is at `name`, None if nothing is."""
        path = self.path(name)
        try:
            about = path.stat()
        except OSError:
            return None
        number = (os.major(about.st_rdev), os.minor(about.st_rdev))
        acl = b""
        with suppress(OSError):  # no list, or a file system without
            acl = os.getxattr(path, "system.posix_acl_access")
        return Node(
            mode=stat.S_IMODE(about.st_mode),
            uid=about.st_uid,
            gid=about.st_gid,
            number=number if stat.S_ISCHR(about.st_mode) else None,
            acl=parse_acl(acl),
        )

    def open_error(self, name: str) -> int:
        """Open a node for reading and writing and close it; return the errno, 0 if it worked."""
        try:
            os.close(os.open(self.path(name), os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as refused:
            return refused.errno or errno.EIO
        return 0

    @cached_property
    def owning(self) -> VhostctlError | None:
        """Open the device, own it and close it: None if that worked, else what went wrong."""
        return _own(lambda: VhostNet.open(str(self.path(self.device)), self.device))

    @cached_property
    def engine(self) -> VhostctlError | None:
        """Open, own and close the vhost-net of this process: None if that worked."""
        return _own(VhostNet.embedded)

    def program(self, name: str) -> bool:
        """Return whether a program is on $PATH."""
        return shutil.which(name) is not None


def _own(make: Callable[[], VhostNet]) -> VhostctlError | None:
    try:
        with make() as device:
            device.set_owner()
            device.get_features()
    except VhostctlError as refused:
        return refused
    except ImportError as missing:
        return VhostctlError(str(missing))
    return None
