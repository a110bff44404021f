"""A device node, opened: the errors that opening one gives are explained here."""

from __future__ import annotations

import errno
import os
from typing import Self

from vhostctl.abi.ioctl import Request
from vhostctl.errors import kernel_error
from vhostctl.host.handle import Handle
from vhostctl.host.ioctl import ioctl

_MODULES = {
    "/dev/vhost-net": "vhost_net",
    "/dev/net/tun": "tun",
    "/dev/kvm": "kvm-amd, or kvm-intel",
}


def _hint(path: str, number: int) -> str:
    module = _MODULES.get(path)
    load = f"modprobe {module}" if module else "check the path"
    return {
        errno.ENOENT: load,
        errno.ENODEV: load,
        errno.ENXIO: load,
        errno.EACCES: "run as root, or as a member of the group that owns the node",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.EPERM: "the device cgroup or a security module denies it",
    }.get(number, "")


class DeviceNode(Handle):
    """An open character device that takes ioctls; its label is its path."""

    def __init__(self, path: str) -> None:
        """Open `path` read-write, close-on-exec. Raises KernelError with the remedy."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            number = error.errno or 0
            raise kernel_error(number, "open", path, _hint(path, number)) from error
        super().__init__(fd, path)

    @classmethod
    def adopt(cls, fd: int, label: str) -> Self:
        """Own `fd`, which somebody else opened; `label` is what errors call it."""
        node = cls.__new__(cls)
        Handle.__init__(node, fd, label)
        return node

    def ioctl(self, request: Request, argument: object) -> int:
        """As ioctl(2): return its result, raise OSError with its errno."""
        return ioctl(self.fileno(), request, argument)

    def read(self, size: int) -> bytes:
        """As read(2): return up to `size` bytes, raise OSError with its errno."""
        return os.read(self.fileno(), size)

    def write(self, data: bytes) -> int:
        """As write(2): return how many bytes it says it took, raise OSError with its errno."""
        return os.write(self.fileno(), data)
