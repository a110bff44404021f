"""IOTLB messages that are written, and the system calls beside ioctl (linux/vhost_types.h)."""

from __future__ import annotations

import mmap
import os
import select
import struct
from functools import partial

from vhostctl.abi import vhost, virtio
from vhostctl.conformance.case import case
from vhostctl.conformance.cases.support import (
    BAD,
    elsewhere,
    invalidate,
    map_pages,
    message,
    owned,
    update,
)
from vhostctl.conformance.target import Target
from vhostctl.host.vhost import VhostNet

PLATFORM = 1 << virtio.VIRTIO_F_ACCESS_PLATFORM
WHOLE = 72
"""Bytes of a message in either version."""

NEEDED = 40
"""Bytes of it that are read: the rest is padding."""

PAGE = 4096
NO_ACCESS = 0


def translating(target: Target) -> VhostNet:
    """Return a device in IOTLB mode."""
    device = owned(target)
    device.set_features(PLATFORM)
    return device


def _write(target: Target, device: VhostNet, data: bytes) -> str:
    return target.refused(lambda: device.write(data))


def _send(target: Target, device: VhostNet, sent: vhost.vhost_msg) -> str:
    return target.refused(lambda: device.write_message(sent))


def _second(sent: vhost.vhost_msg, asid: int = 0) -> vhost.vhost_msg_v2:
    """Return the message in version 2."""
    found = vhost.vhost_msg_v2(type=vhost.VHOST_IOTLB_MSG_V2, asid=asid)
    found.iotlb = sent.iotlb
    return found


@case("Out of IOTLB mode updates and invalidations are EFAULT.")
def wrong_mode(target: Target) -> None:
    device = owned(target)
    target.check("update", _send(target, device, update(0, PAGE, 0x10000)), "EFAULT")
    target.check("invalidate", _send(target, device, invalidate(0, PAGE)), "EFAULT")
    target.check("no owner", _send(target, target.open(), invalidate(0, PAGE)), "EFAULT")


@case("An update of size 0 is EINVAL, in IOTLB mode and out of it.")
def update_nothing(target: Target) -> None:
    for name, device in (("off", owned(target)), ("on", translating(target))):
        target.check(name, _send(target, device, update(0, 0, 0x10000)), "EINVAL")
        target.check(f"{name}, bad", _send(target, device, update(PAGE, 0, BAD)), "EINVAL")


@case("A message without a whole type is EINVAL.")
def no_type(target: Target) -> None:
    device = translating(target)
    for length in range(4):
        data = bytes(invalidate(0, PAGE))[:length]
        target.check(f"{length} bytes", _write(target, device, data), "EINVAL")


@case("A message of any type but 1 and 2 is EINVAL, in IOTLB mode and out of it.")
def wrong_type(target: Target) -> None:
    for name, device in (("off", owned(target)), ("on", translating(target))):
        for kind in (0, 3, 256, 2**31, 2**32 - 1):
            data = struct.pack("=I", kind) + bytes(invalidate(0, PAGE))[4:]
            target.check(f"{name}, type {kind}", _write(target, device, data), "EINVAL")


@case("A message of fewer than 40 bytes is EINVAL, in both versions.")
def short(target: Target) -> None:
    device = translating(target)
    first = invalidate(0, PAGE)
    for version, data in ((1, bytes(first)), (2, bytes(_second(first)))):
        for length in (4, 8, 32, NEEDED - 1):
            found = _write(target, device, data[:length])
            target.check(f"version {version}, {length} bytes", found, "EINVAL")


@case("A message of 40 bytes or more is taken, and write() says 72 whatever its length.")
def lengths(target: Target) -> None:
    device = translating(target)
    first = invalidate(0, PAGE)
    for version, data in ((1, bytes(first)), (2, bytes(_second(first)))):
        for length in (NEEDED, NEEDED + 1, WHOLE, WHOLE + 28):
            found = device.write((data + bytes(100))[:length])
            target.check(f"version {version}, {length} bytes", found, WHOLE)


@case("Padding of a message is not looked at.")
def message_padding(target: Target) -> None:
    device = translating(target)
    for sent in (invalidate(0, PAGE), _second(invalidate(0, PAGE))):
        data = bytearray(b"\xff" * WHOLE)
        start = bytes(sent)[:4] if sent.type == 1 else bytes(sent)[:8]
        data[: len(start)] = start
        data[8:34] = bytes(sent)[8:34]
        target.check(f"version {sent.type}", _write(target, device, bytes(data)), "")


@case("Version 2 is taken without IOTLB_MSG_V2 acknowledged, version 1 with it.")
def versions(target: Target) -> None:
    device = translating(target)
    for bits in (0, 1 << vhost.VHOST_BACKEND_F_IOTLB_MSG_V2):
        device.set_backend_features(bits)
        for name, sent in (("1", update(0, PAGE, PAGE)), ("2", _second(update(0, PAGE, PAGE)))):
            found = target.refused(partial(device.write_message, sent))
            target.check(f"version {name}, bits {bits}", found, "")


@case("The address space of a message in version 2 is ignored.")
def address_space(target: Target) -> None:
    device = translating(target)
    for asid in (1, 2**16, 2**32 - 1):
        sent = _second(invalidate(0, PAGE), asid)
        target.check(f"{asid}", target.refused(partial(device.write_message, sent)), "")


@case("Only updates and invalidations are taken; any other kind of message is EFAULT.")
def kinds(target: Target) -> None:
    device = translating(target)
    for kind in (
        0,
        vhost.VHOST_IOTLB_MISS,
        vhost.VHOST_IOTLB_ACCESS_FAIL,
        vhost.VHOST_IOTLB_BATCH_BEGIN,
        vhost.VHOST_IOTLB_BATCH_END,
        255,
    ):
        sent = message(kind, 0, PAGE, 0x10000, vhost.VHOST_ACCESS_RW)
        target.check(f"kind {kind}", _send(target, device, sent), "EFAULT")


@case("An update to what is no memory of a process is EFAULT, for any access.")
def update_no_memory(target: Target) -> None:
    device = translating(target)
    for perm in (vhost.VHOST_ACCESS_RO, vhost.VHOST_ACCESS_WO, vhost.VHOST_ACCESS_RW):
        target.check(f"perm {perm}", _send(target, device, update(0, PAGE, BAD, perm)), "EFAULT")


@case("An update for no access may name any address.")
def update_no_access(target: Target) -> None:
    device = translating(target)
    target.check("2^60", _send(target, device, update(0, PAGE, BAD, NO_ACCESS)), "")


@case("An update need not name memory that is mapped.")
def update_unmapped(target: Target) -> None:
    device = translating(target)
    target.check("null", _send(target, device, update(0, PAGE, 0)), "")


@case("An update that goes round the end of the address space is EFAULT.")
def update_wraps(target: Target) -> None:
    device = translating(target)
    last = 2**64 - PAGE
    target.check("round", _send(target, device, update(last, 2 * PAGE, 0x10000)), "EFAULT")
    target.check("round, no access", _send(target, device, update(last, 2 * PAGE, 0, 0)), "EFAULT")
    target.check("to the end", _send(target, device, update(last, PAGE, 0x10000)), "")


@case("An update may map what is mapped already, in part or in whole.")
def update_again(target: Target) -> None:
    device = translating(target)
    for iova, size in ((0, 4 * PAGE), (0, 4 * PAGE), (PAGE, PAGE), (3 * PAGE, 4 * PAGE)):
        found = _send(target, device, update(iova, size, 0x10000))
        target.check(f"{len(target.observed)}: {iova:#x}+{size:#x}", found, "")


@case("More updates than the IOTLB holds are taken all the same.")
def update_many(target: Target) -> None:
    device = translating(target)
    target.check("3000", target.refused(lambda: map_pages(device, 3000, 0)), "")


@case("Addresses and sizes of an update need no alignment.")
def update_unaligned(target: Target) -> None:
    device = translating(target)
    target.check("odd", _send(target, device, update(3, 5, 0x10007)), "")


@case("What is not mapped may be invalidated.")
def invalidate_nothing(target: Target) -> None:
    device = translating(target)
    target.check("page", _send(target, device, invalidate(PAGE, PAGE)), "")
    target.check("to the end", _send(target, device, invalidate(1, 2**64 - 1)), "")


@case("An invalidation of size 0 is taken: at address 0 it is all there is.")
def invalidate_zero(target: Target) -> None:
    device = translating(target)
    _send(target, device, update(0, PAGE, 0x10000))
    target.check("at 0", _send(target, device, invalidate(0, 0)), "")
    target.check("at 4096", _send(target, device, invalidate(PAGE, 0)), "")


@case("Messages may be written without an owner, and by another process than the owner.")
def anybody(target: Target) -> None:
    device = target.open()
    device.set_features(PLATFORM)
    target.check("no owner", _send(target, device, update(0, PAGE, 0x10000)), "")
    device.set_owner()
    found = elsewhere(lambda: _send(target, device, invalidate(0, PAGE)))
    target.check("other process", found, "")


@case("read() into less than a message gives nothing, in IOTLB mode and out of it.")
def read_short(target: Target) -> None:
    for name, device in (("off", owned(target)), ("on", translating(target))):
        for size in (1, NEEDED, WHOLE - 1):
            target.check(f"{name}, {size} bytes", device.read(size).hex(), "")


@case("read() without a message is EAGAIN, in IOTLB mode and out of it, owner or none.")
def read_nothing(target: Target) -> None:
    for name, device in (
        ("no owner", target.open()),
        ("off", owned(target)),
        ("on", translating(target)),
    ):
        for size in (WHOLE, 4 * WHOLE):
            found = target.refused(partial(device.read, size))
            target.check(f"{name}, {size} bytes", found, "EAGAIN")


@case("What is written is not what is read.")
def no_echo(target: Target) -> None:
    device = translating(target)
    _send(target, device, update(0, PAGE, 0x10000))
    target.check("read", target.refused(lambda: device.read(WHOLE)), "EAGAIN")


@case("A blocking read() out of IOTLB mode is EBADFD.", needs=("node",))
def read_blocking(target: Target) -> None:
    device = owned(target)
    os.set_blocking(device.fileno(), True)
    target.check("read", target.refused(lambda: device.read(WHOLE)), "EBADFD")


@case("Without a message poll() says nothing, not even that one may be written.")
def poll_nothing(target: Target) -> None:
    events = select.POLLIN | select.POLLRDNORM | select.POLLOUT | select.POLLWRNORM
    for name, device in (
        ("no owner", target.open()),
        ("off", owned(target)),
        ("on", translating(target)),
    ):
        poll = select.poll()
        poll.register(device.fileno(), events)
        target.check(name, poll.poll(0), [])


@case("lseek() stays at 0.", needs=("node",))
def seek(target: Target) -> None:
    device = owned(target)
    for whence in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
        target.check(f"whence {whence}", os.lseek(device.fileno(), 100, whence), 0)


@case("mmap() is ENODEV.", needs=("node",))
def memory_map(target: Target) -> None:
    device = owned(target)
    found = target.refused(lambda: mmap.mmap(device.fileno(), mmap.PAGESIZE))
    target.check("mmap", found, "ENODEV")
