"""The one place that calls ioctl(2), and what to do about each refusal."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from typing import Protocol

from vhostctl.abi.ioctl import Request
from vhostctl.errors import KernelError, kernel_error

# What the caller can do about it, by request and errno. None stands for any request.
_HINTS: dict[tuple[str | None, int], str] = {
    ("VHOST_SET_OWNER", errno.EBUSY): "it has an owner already: open the node again",
    ("VHOST_SET_OWNER", errno.ENOTTY): "the path is no vhost device",
    ("VHOST_SET_OWNER", errno.ENOMEM): "the worker could not be made: raise RLIMIT_NPROC",
    ("VHOST_SET_MEM_TABLE", errno.E2BIG): "merge regions, or raise vhost's max_mem_regions",
    ("VHOST_SET_FEATURES", errno.EOPNOTSUPP): "see `vhostctl probe` for what it offers",
    ("VHOST_NET_SET_BACKEND", errno.ENOTSOCK): "give it a tap, macvtap or packet socket",
    ("VHOST_NET_SET_BACKEND", errno.EFAULT): "the rings lie outside the memory table",
    ("VHOST_NET_SET_BACKEND", errno.EINVAL): "the tap descriptor has no device: TUNSETIFF first",
    ("TUNSETIFF", errno.EPERM): "run with CAP_NET_ADMIN, or have the tap made for your user",
    ("TUNSETIFF", errno.EBUSY): "somebody has the tap open: stop them, or take another name",
    ("TUNSETIFF", errno.E2BIG): "a tap has at most 256 queues",
    ("TUNSETIFF", errno.EINVAL): "the name is taken by another kind of device, or queues differ",
    ("TUNSETQUEUE", errno.EINVAL): "the tap has a single queue, or this one is so already",
    ("TUNSETOFFLOAD", errno.EINVAL): "a flag this kernel does not know, or one without TUN_F_CSUM",
    ("KVM_CREATE_VM", errno.ENOMEM): "the host is short of memory, or of room for VMs",
    ("KVM_CREATE_IRQCHIP", errno.EEXIST): "the VM has its irqchips already",
    ("KVM_CREATE_IRQCHIP", errno.EINVAL): "make the irqchips before the first vCPU",
    ("KVM_CREATE_VCPU", errno.EEXIST): "each vCPU of a VM has an index of its own",
    ("KVM_CREATE_VCPU", errno.EINVAL): "KVM_CAP_MAX_VCPUS says how many there may be",
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "the range overlaps another slot's",
    ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL): "a multiple of 4096 is missing, the slot is"
    " past KVM_CAP_NR_MEMSLOTS, or it changes in more than its flags: delete it first",
    ("KVM_IOEVENTFD", errno.EEXIST): "another ioeventfd has this address, length and value"
    " (one of any length or any value has them all): take that away first",
    ("KVM_IOEVENTFD", errno.EINVAL): "the length is 1, 2, 4 or 8 bytes, or 0 without"
    " datamatch, and the descriptor is an eventfd",
    ("KVM_IOEVENTFD", errno.ENOENT): "there is no such ioeventfd to take away",
    ("KVM_IOEVENTFD", errno.ENOSPC): "the VM has as many ioeventfds as KVM keeps: merge some",
    ("KVM_IRQFD", errno.EBUSY): "the eventfd raises an interrupt already: take that away first",
    ("KVM_IRQFD", errno.EAGAIN): "make the irqchips first",
    ("KVM_IRQFD", errno.EINVAL): "it takes an eventfd, and irqchips that are made before",
    ("KVM_SET_GSI_ROUTING", errno.EINVAL): "a GSI is past 4095, or a pin or chip does not exist",
    ("KVM_SET_CPUID2", errno.EINVAL): "a vCPU that ran keeps the CPUID that it had, and no"
    " processor shows what it cannot do: compare the hosts",
    ("KVM_RUN", errno.EFAULT): "the guest touched a slot whose memory is not there (any more)",
    (None, errno.EPERM): "only the process that called VHOST_SET_OWNER may do this",
}


_libc = ctypes.CDLL(None, use_errno=True)


class Channel(Protocol):
    """What answers requests: a descriptor, or an engine in this process."""

    label: str

    def ioctl(self, request: Request, argument: object) -> int:
        """As ioctl(2): return its result, raise OSError with its errno."""
        ...


def ioctl(fd: int, request: Request, argument: object) -> int:
    """Issue `request` on `fd`; `argument` is a ctypes object, an int or None.

    An int goes as it is: a value, or an address, which need not be valid. Returns
    ioctl(2)'s result; raises OSError as it came.
    """
    if argument is not None and not isinstance(argument, int):
        return fcntl.ioctl(fd, request.number, argument)  # type: ignore[call-overload, no-any-return]
    # fcntl.ioctl takes numbers of 32 bits only, which no address fits.
    result: int = _libc.ioctl(fd, ctypes.c_ulong(request.number), ctypes.c_ulong(argument or 0))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def refusal(error: OSError, request: str, target: str) -> KernelError:
    """Return `error` as a KernelError that names request, target and remedy."""
    number = error.errno or 0
    general = _HINTS.get((None, number), "") if request.startswith("VHOST_") else ""
    return kernel_error(number, request, target, _HINTS.get((request, number), general))


def call(channel: Channel, request: Request, argument: object = None, part: str = "") -> int:
    """Ask `channel` for `request`; `part` says which queue. Raises KernelError."""
    try:
        return channel.ioctl(request, argument)
    except OSError as error:
        raise refusal(error, request.name, f"{channel.label} {part}".rstrip()) from error
