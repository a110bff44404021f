"""Mirror of ``linux/vhost.h`` and ``linux/vhost_types.h``: what concerns a vhost-net descriptor.

Requests, structs and bits of vhost-scsi, vhost-vsock and vhost-vdpa are left out, except
the worker requests: the headers do not tie those to a device.
"""

from __future__ import annotations

import ctypes

from vhostctl.abi.ioctl import io, ior, iow, iowr
from vhostctl.abi.layout import Struct, flexible
from vhostctl.errors import InvalidArgument

HEADERS = ("linux/vhost.h", "linux/vhost_types.h")

_u8 = ctypes.c_uint8
_u32 = ctypes.c_uint32
_u64 = ctypes.c_uint64


class vhost_vring_state(Struct):
    """One number of one ring (8 bytes): its size, base, byte order or busy-poll time."""

    __slots__ = ()
    _fields_ = (("index", _u32), ("num", _u32))


class vhost_vring_file(Struct):
    """One file of one ring (8 bytes), eventfd or backend; VHOST_FILE_UNBIND for none."""

    __slots__ = ()
    _fields_ = (("index", _u32), ("fd", ctypes.c_int))


class vhost_vring_addr(Struct):
    """Where one ring lies (40 bytes).

    The three ``*_user_addr`` are host virtual addresses (with VIRTIO_F_ACCESS_PLATFORM
    I/O virtual ones); `log_guest_addr` is the guest physical address of the used ring.
    `flags` is a mask of ``1 << VHOST_VRING_F_LOG``.
    """

    __slots__ = ()
    _fields_ = (
        ("index", _u32),
        ("flags", _u32),
        ("desc_user_addr", _u64),
        ("used_user_addr", _u64),
        ("avail_user_addr", _u64),
        ("log_guest_addr", _u64),
    )


class vhost_worker_state(Struct):
    """A worker by its id (4 bytes)."""

    __slots__ = ()
    _fields_ = (("worker_id", _u32),)


class vhost_vring_worker(Struct):
    """Which worker serves which ring (8 bytes)."""

    __slots__ = ()
    _fields_ = (("index", _u32), ("worker_id", _u32))


class vhost_iotlb_msg(Struct):
    """One IOTLB message (32 bytes): `iova` and `size` in bytes, `uaddr` a host virtual address.

    `perm` is one of VHOST_ACCESS_*, `type` one of VHOST_IOTLB_*.
    """

    __slots__ = ()
    _fields_ = (("iova", _u64), ("size", _u64), ("uaddr", _u64), ("perm", _u8), ("type", _u8))


class _payload(ctypes.Union):
    _fields_ = (("iotlb", vhost_iotlb_msg), ("padding", _u8 * 64))


class vhost_msg(Struct):
    """What read(2) and write(2) carry in version 1 (72 bytes); `type` is VHOST_IOTLB_MSG."""

    __slots__ = ()
    _anonymous_ = ("_payload",)
    _fields_ = (("type", ctypes.c_int), ("_payload", _payload))


class vhost_msg_v2(Struct):
    """What read(2) and write(2) carry in version 2 (72 bytes); `type` is VHOST_IOTLB_MSG_V2."""

    __slots__ = ()
    _anonymous_ = ("_payload",)
    _fields_ = (("type", _u32), ("asid", _u32), ("_payload", _payload))


class vhost_memory_region(Struct):
    """A range of guest physical addresses and the host memory behind it (32 bytes)."""

    __slots__ = ()
    _fields_ = (
        ("guest_phys_addr", _u64),
        ("memory_size", _u64),
        ("userspace_addr", _u64),
        ("flags_padding", _u64),
    )


class vhost_memory(Struct):
    """Header of the memory table (8 bytes); `vhost_memory_table` makes one with its regions."""

    __slots__ = ()
    _fields_ = (("nregions", _u32), ("padding", _u32), ("regions", vhost_memory_region * 0))


class vhost_features_array(Struct):
    """Header of a feature mask of any width (8 bytes); see `vhost_features_table`."""

    __slots__ = ()
    _fields_ = (("count", _u64), ("features", _u64 * 0))


def vhost_memory_table(
    regions: list[vhost_memory_region] | tuple[vhost_memory_region, ...],
) -> vhost_memory:
    """Return the argument of VHOST_SET_MEM_TABLE: 8 + 32 * len(regions) bytes.

    The regions are copied. How many are allowed, and that they must not wrap round, is
    left to the kernel to say.
    """
    sized = flexible(vhost_memory, "regions", len(regions))
    table: vhost_memory = sized(nregions=len(regions), regions=tuple(regions))
    return table


def vhost_features_table(bits: int = 0, count: int = 2) -> vhost_features_array:
    """Return the argument of VHOST_{GET,SET}_FEATURES_ARRAY: 8 + 8 * count bytes.

    `bits` is the mask as one integer, bit N being feature N; `count` is the number of
    64-bit words. Raises InvalidArgument if the mask needs more words, or either is negative.
    """
    if count < 0 or bits < 0 or bits >> 64 * count:
        raise InvalidArgument(f"feature mask {bits:#x} does not fit {count} words of 64 bits")
    sized = flexible(vhost_features_array, "features", count)
    words = tuple(bits >> 64 * word & 2**64 - 1 for word in range(count))
    table: vhost_features_array = sized(count=count, features=words)
    return table


def vhost_features_bits(table: vhost_features_array) -> int:
    """Return the mask that `table` holds as one integer, bit N being feature N."""
    return sum(word << 64 * index for index, word in enumerate(table.features))


VHOST_FILE_UNBIND = -1
VHOST_VIRTIO = 0xAF

VHOST_VRING_LITTLE_ENDIAN = 0
VHOST_VRING_BIG_ENDIAN = 1

VHOST_VRING_F_LOG = 0  # a bit number, unlike VHOST_ACCESS_*

VHOST_ACCESS_RO = 1
VHOST_ACCESS_WO = 2
VHOST_ACCESS_RW = 3

VHOST_IOTLB_MISS = 1
VHOST_IOTLB_UPDATE = 2
VHOST_IOTLB_INVALIDATE = 3
VHOST_IOTLB_ACCESS_FAIL = 4
VHOST_IOTLB_BATCH_BEGIN = 5
VHOST_IOTLB_BATCH_END = 6

VHOST_IOTLB_MSG = 1
VHOST_IOTLB_MSG_V2 = 2

VHOST_PAGE_SIZE = 0x1000  # unit of the dirty log, whatever the page size of the host

VHOST_FORK_OWNER_KTHREAD = 0
VHOST_FORK_OWNER_TASK = 1

# Bits of {GET,SET}_FEATURES that only vhost knows. 27 is also VIRTIO_F_ANY_LAYOUT, but
# towards vhost-net it always means that vhost supplies and strips the header.
VHOST_F_LOG_ALL = 26
VHOST_NET_F_VIRTIO_NET_HDR = 27

# Bits of {GET,SET}_BACKEND_FEATURES. vhost-net offers the first only.
VHOST_BACKEND_F_IOTLB_MSG_V2 = 1
VHOST_BACKEND_F_IOTLB_BATCH = 2
VHOST_BACKEND_F_IOTLB_ASID = 3
VHOST_BACKEND_F_SUSPEND = 4
VHOST_BACKEND_F_RESUME = 5
VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK = 6
VHOST_BACKEND_F_DESC_ASID = 7
VHOST_BACKEND_F_IOTLB_PERSIST = 8

VHOST_GET_FEATURES = ior("VHOST_GET_FEATURES", VHOST_VIRTIO, 0x00, _u64)
VHOST_SET_FEATURES = iow("VHOST_SET_FEATURES", VHOST_VIRTIO, 0x00, _u64)
VHOST_SET_OWNER = io("VHOST_SET_OWNER", VHOST_VIRTIO, 0x01)
VHOST_RESET_OWNER = io("VHOST_RESET_OWNER", VHOST_VIRTIO, 0x02)
VHOST_SET_MEM_TABLE = iow("VHOST_SET_MEM_TABLE", VHOST_VIRTIO, 0x03, vhost_memory)
VHOST_SET_LOG_BASE = iow("VHOST_SET_LOG_BASE", VHOST_VIRTIO, 0x04, _u64)
VHOST_SET_LOG_FD = iow("VHOST_SET_LOG_FD", VHOST_VIRTIO, 0x07, ctypes.c_int)
VHOST_NEW_WORKER = ior("VHOST_NEW_WORKER", VHOST_VIRTIO, 0x08, vhost_worker_state)
VHOST_FREE_WORKER = iow("VHOST_FREE_WORKER", VHOST_VIRTIO, 0x09, vhost_worker_state)

VHOST_SET_VRING_NUM = iow("VHOST_SET_VRING_NUM", VHOST_VIRTIO, 0x10, vhost_vring_state)
VHOST_SET_VRING_ADDR = iow("VHOST_SET_VRING_ADDR", VHOST_VIRTIO, 0x11, vhost_vring_addr)
VHOST_SET_VRING_BASE = iow("VHOST_SET_VRING_BASE", VHOST_VIRTIO, 0x12, vhost_vring_state)
VHOST_GET_VRING_BASE = iowr("VHOST_GET_VRING_BASE", VHOST_VIRTIO, 0x12, vhost_vring_state)
VHOST_SET_VRING_ENDIAN = iow("VHOST_SET_VRING_ENDIAN", VHOST_VIRTIO, 0x13, vhost_vring_state)
VHOST_ATTACH_VRING_WORKER = iow("VHOST_ATTACH_VRING_WORKER", VHOST_VIRTIO, 0x15, vhost_vring_worker)
VHOST_GET_VRING_WORKER = iowr("VHOST_GET_VRING_WORKER", VHOST_VIRTIO, 0x16, vhost_vring_worker)

VHOST_SET_VRING_KICK = iow("VHOST_SET_VRING_KICK", VHOST_VIRTIO, 0x20, vhost_vring_file)
VHOST_SET_VRING_CALL = iow("VHOST_SET_VRING_CALL", VHOST_VIRTIO, 0x21, vhost_vring_file)
VHOST_SET_VRING_ERR = iow("VHOST_SET_VRING_ERR", VHOST_VIRTIO, 0x22, vhost_vring_file)

# These two GETs write to the caller and are still encoded _IOW: frozen since linux 4.2 and 4.6.
VHOST_GET_VRING_ENDIAN = iow("VHOST_GET_VRING_ENDIAN", VHOST_VIRTIO, 0x14, vhost_vring_state)
VHOST_GET_VRING_BUSYLOOP_TIMEOUT = iow(
    "VHOST_GET_VRING_BUSYLOOP_TIMEOUT", VHOST_VIRTIO, 0x24, vhost_vring_state
)
VHOST_SET_VRING_BUSYLOOP_TIMEOUT = iow(
    "VHOST_SET_VRING_BUSYLOOP_TIMEOUT", VHOST_VIRTIO, 0x23, vhost_vring_state
)

VHOST_SET_BACKEND_FEATURES = iow("VHOST_SET_BACKEND_FEATURES", VHOST_VIRTIO, 0x25, _u64)
VHOST_GET_BACKEND_FEATURES = ior("VHOST_GET_BACKEND_FEATURES", VHOST_VIRTIO, 0x26, _u64)
VHOST_NET_SET_BACKEND = iow("VHOST_NET_SET_BACKEND", VHOST_VIRTIO, 0x30, vhost_vring_file)
VHOST_GET_FEATURES_ARRAY = ior("VHOST_GET_FEATURES_ARRAY", VHOST_VIRTIO, 0x83, vhost_features_array)
VHOST_SET_FEATURES_ARRAY = iow("VHOST_SET_FEATURES_ARRAY", VHOST_VIRTIO, 0x83, vhost_features_array)

# In stable 6.12.43 this pair was 0x83 and 0x84; 6.12.48 has the numbers of mainline.
VHOST_SET_FORK_FROM_OWNER = iow("VHOST_SET_FORK_FROM_OWNER", VHOST_VIRTIO, 0x84, _u8)
VHOST_GET_FORK_FROM_OWNER = ior("VHOST_GET_FORK_FROM_OWNER", VHOST_VIRTIO, 0x85, _u8)

VHOST_NET_REQUESTS = (
    VHOST_GET_FEATURES,
    VHOST_SET_FEATURES,
    VHOST_GET_FEATURES_ARRAY,
    VHOST_SET_FEATURES_ARRAY,
    VHOST_GET_BACKEND_FEATURES,
    VHOST_SET_BACKEND_FEATURES,
    VHOST_GET_FORK_FROM_OWNER,
    VHOST_SET_FORK_FROM_OWNER,
    VHOST_SET_OWNER,
    VHOST_RESET_OWNER,
    VHOST_SET_MEM_TABLE,
    VHOST_SET_LOG_BASE,
    VHOST_SET_LOG_FD,
    VHOST_SET_VRING_NUM,
    VHOST_SET_VRING_ADDR,
    VHOST_SET_VRING_BASE,
    VHOST_GET_VRING_BASE,
    VHOST_SET_VRING_ENDIAN,
    VHOST_GET_VRING_ENDIAN,
    VHOST_SET_VRING_BUSYLOOP_TIMEOUT,
    VHOST_GET_VRING_BUSYLOOP_TIMEOUT,
    VHOST_SET_VRING_KICK,
    VHOST_SET_VRING_CALL,
    VHOST_SET_VRING_ERR,
    VHOST_NET_SET_BACKEND,
    VHOST_NEW_WORKER,
    VHOST_FREE_WORKER,
    VHOST_ATTACH_VRING_WORKER,
    VHOST_GET_VRING_WORKER,
)
"""Every request that may be asked of a vhost-net descriptor, in the order of a bring-up.

The last four are in the header for every device, but only vhost-scsi is wired to them:
vhost-net answers ENOTTY (or ENOBUFS if the first word of the argument is above 1).
"""
