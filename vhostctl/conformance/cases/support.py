"""What the cases about requests share: devices, addresses that fail, other processes."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vhostctl.abi import vhost
from vhostctl.abi.ioctl import Request
from vhostctl.conformance import child
from vhostctl.conformance.rig import Rig, Setup
from vhostctl.conformance.target import Target
from vhostctl.host.closing import Closing
from vhostctl.host.vhost import VhostNet

BAD = 1 << 60
"""An address that no process has, with page tables of any depth."""

NO_FD = 1 << 20
"""A number that is no descriptor."""

MISSING_RING = 2

OF_RINGS = (
    vhost.VHOST_SET_VRING_NUM,
    vhost.VHOST_SET_VRING_ADDR,
    vhost.VHOST_SET_VRING_BASE,
    vhost.VHOST_GET_VRING_BASE,
    vhost.VHOST_SET_VRING_ENDIAN,
    vhost.VHOST_GET_VRING_ENDIAN,
    vhost.VHOST_SET_VRING_KICK,
    vhost.VHOST_SET_VRING_CALL,
    vhost.VHOST_SET_VRING_ERR,
    vhost.VHOST_SET_VRING_BUSYLOOP_TIMEOUT,
    vhost.VHOST_GET_VRING_BUSYLOOP_TIMEOUT,
)
"""Requests that begin with the index of a ring; NET_SET_BACKEND does too, and is no such."""

OF_OWNER = (
    vhost.VHOST_SET_MEM_TABLE,
    vhost.VHOST_SET_LOG_BASE,
    vhost.VHOST_SET_LOG_FD,
    *OF_RINGS,
)
"""Requests that only the owner may make, and that are asked who calls before all else."""

OF_WORKERS = (
    vhost.VHOST_NEW_WORKER,
    vhost.VHOST_FREE_WORKER,
    vhost.VHOST_ATTACH_VRING_WORKER,
    vhost.VHOST_GET_VRING_WORKER,
)
"""Requests of the header that vhost-net does not know."""


class Edge(Closing):
    """Two pages, the second of which cannot be touched."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(anchor)
        del anchor
        protect(self._address + mmap.PAGESIZE, mmap.PAGESIZE, 0)

    def before(self, data: bytes) -> int:
        """Return the address of a copy of `data` after which nothing can be read or written."""
        start = mmap.PAGESIZE - len(data)
        self._map[start : mmap.PAGESIZE] = data
        return self._address + start

    def words(self, *values: int) -> int:
        """Return `before` of 32-bit words."""
        return self.before(struct.pack(f"={len(values)}I", *values))

    def close(self) -> None:
        """Unmap; a second call does nothing."""
        self._map.close()


def protect(address: int, size: int, access: int) -> None:
    """mprotect(2): `access` is PROT_READ (1) and PROT_WRITE (2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), access):
        raise OSError(ctypes.get_errno(), "mprotect")


def owned(target: Target) -> VhostNet:
    """Return a fresh device that this process owns."""
    device = target.open()
    device.set_owner()
    return device


def running(target: Target) -> Rig:
    """Return a device with a tap on both rings, and memory below it."""
    return Rig(target)


def stopped(target: Target, features: int | None = None) -> Rig:
    """Return a device for which only the tap is missing."""
    setup = Setup(start=False)
    return Rig(target, setup if features is None else Setup(features=features, start=False))


def ask(target: Target, device: VhostNet, request: Request, argument: object = None) -> str:
    """Return the errno's name that the request is refused with, or ""."""
    return target.refused(lambda: device.request(request, argument))


def unknown(number: int) -> Request:
    """Return a request that has a number and nothing else."""
    return Request(f"request {number:#x}", number)


def file_of(queue: int, fd: int) -> vhost.vhost_vring_file:
    """Return the argument of KICK, CALL, ERR and NET_SET_BACKEND."""
    return vhost.vhost_vring_file(index=queue, fd=fd)


def state_of(queue: int, num: int = 0) -> vhost.vhost_vring_state:
    """Return the argument of NUM, BASE and BUSYLOOP_TIMEOUT."""
    return vhost.vhost_vring_state(index=queue, num=num)


def elsewhere(function: Callable[[], object]) -> Any:
    """Return what `function` returns in another process, a child, as JSON says it."""
    with warnings.catch_warnings():
        # A worker may be a thread of this process; the child has no use for it.
        warnings.simplefilter("ignore", DeprecationWarning)
        return child.call(function, 30)


def has_link(name: str) -> bool:
    """Return whether the network namespace of this process has the link `name`."""
    return any(
        line.split(":")[0].strip() == name
        for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()
    )


def eventfd_id() -> int:
    """Return the number that the kernel gives the next eventfd: the lowest one not in use."""
    fd = os.eventfd(0)
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
    finally:
        os.close(fd)
    fields = dict(line.split(":", 1) for line in info.splitlines())
    return int(fields["eventfd-id"])


def is_running(target: Target, device: VhostNet, queue: int) -> bool:
    """Return whether the ring has a backend: its size cannot be set then."""
    return ask(target, device, vhost.VHOST_SET_VRING_NUM, state_of(queue, 64)) == "EBUSY"


def message(
    kind: int, iova: int = 0, size: int = 0, uaddr: int = 0, perm: int = 0
) -> vhost.vhost_msg:
    """Return an IOTLB message in version 1: `kind` is VHOST_IOTLB_*, `perm` VHOST_ACCESS_*."""
    found = vhost.vhost_msg(type=vhost.VHOST_IOTLB_MSG)
    found.iotlb = vhost.vhost_iotlb_msg(iova=iova, size=size, uaddr=uaddr, perm=perm, type=kind)
    return found


def update(iova: int, size: int, uaddr: int, perm: int = vhost.VHOST_ACCESS_RW) -> vhost.vhost_msg:
    """Return the message that maps `size` bytes at `iova` to `uaddr`."""
    return message(vhost.VHOST_IOTLB_UPDATE, iova, size, uaddr, perm)


def invalidate(iova: int, size: int) -> vhost.vhost_msg:
    """Return the message that unmaps `size` bytes at `iova`."""
    return message(vhost.VHOST_IOTLB_INVALIDATE, iova, size)


def map_pages(device: VhostNet, pages: int, start: int) -> None:
    """Make `pages` mappings of a page each, with holes between them, from `start` on."""
    data = bytearray(bytes(update(0, mmap.PAGESIZE, mmap.PAGESIZE)))
    for number in range(pages):
        struct.pack_into("=Q", data, 8, start + 2 * number * mmap.PAGESIZE)
        device.write(bytes(data))
