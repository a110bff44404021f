"""Mirror of ``linux/virtio_config.h``, ``virtio_ring.h`` and ``virtio_net.h``.

Feature bits and their names, the split virtqueue (virtio 1.2, section 2.7) and the
virtio-net packet header (5.1.6). Packed rings are left out: vhost-net never offers them.
"""

from __future__ import annotations

import ctypes

from vhostctl.abi.layout import Struct
from vhostctl.abi.vhost import VHOST_F_LOG_ALL, VHOST_NET_F_VIRTIO_NET_HDR
from vhostctl.errors import InvalidArgument

HEADERS = ("linux/virtio_config.h", "linux/virtio_ring.h", "linux/virtio_net.h")

_u8 = ctypes.c_uint8
_u16 = ctypes.c_uint16
_u32 = ctypes.c_uint32
_u64 = ctypes.c_uint64

VIRTIO_CONFIG_S_ACKNOWLEDGE = 1
VIRTIO_CONFIG_S_DRIVER = 2
VIRTIO_CONFIG_S_DRIVER_OK = 4
VIRTIO_CONFIG_S_FEATURES_OK = 8
VIRTIO_CONFIG_S_NEEDS_RESET = 0x40
VIRTIO_CONFIG_S_FAILED = 0x80

VIRTIO_NET_F_CSUM = 0
VIRTIO_NET_F_GUEST_CSUM = 1
VIRTIO_NET_F_CTRL_GUEST_OFFLOADS = 2
VIRTIO_NET_F_MTU = 3
VIRTIO_NET_F_MAC = 5
VIRTIO_NET_F_GSO = 6
VIRTIO_NET_F_GUEST_TSO4 = 7
VIRTIO_NET_F_GUEST_TSO6 = 8
VIRTIO_NET_F_GUEST_ECN = 9
VIRTIO_NET_F_GUEST_UFO = 10
VIRTIO_NET_F_HOST_TSO4 = 11
VIRTIO_NET_F_HOST_TSO6 = 12
VIRTIO_NET_F_HOST_ECN = 13
VIRTIO_NET_F_HOST_UFO = 14
VIRTIO_NET_F_MRG_RXBUF = 15
VIRTIO_NET_F_STATUS = 16
VIRTIO_NET_F_CTRL_VQ = 17
VIRTIO_NET_F_CTRL_RX = 18
VIRTIO_NET_F_CTRL_VLAN = 19
VIRTIO_NET_F_CTRL_RX_EXTRA = 20
VIRTIO_NET_F_GUEST_ANNOUNCE = 21
VIRTIO_NET_F_MQ = 22
VIRTIO_NET_F_CTRL_MAC_ADDR = 23
VIRTIO_F_NOTIFY_ON_EMPTY = 24
VIRTIO_F_ANY_LAYOUT = 27
VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_RING_F_EVENT_IDX = 29
VIRTIO_F_VERSION_1 = 32
VIRTIO_F_IOMMU_PLATFORM = 33  # the older name of ACCESS_PLATFORM
VIRTIO_F_ACCESS_PLATFORM = 33
VIRTIO_F_RING_PACKED = 34
VIRTIO_F_IN_ORDER = 35
VIRTIO_F_ORDER_PLATFORM = 36
VIRTIO_F_SR_IOV = 37
VIRTIO_F_NOTIFICATION_DATA = 38
VIRTIO_F_NOTIF_CONFIG_DATA = 39
VIRTIO_F_RING_RESET = 40
VIRTIO_F_ADMIN_VQ = 41
VIRTIO_NET_F_DEVICE_STATS = 50
VIRTIO_NET_F_VQ_NOTF_COAL = 52
VIRTIO_NET_F_NOTF_COAL = 53
VIRTIO_NET_F_GUEST_USO4 = 54
VIRTIO_NET_F_GUEST_USO6 = 55
VIRTIO_NET_F_HOST_USO = 56
VIRTIO_NET_F_HASH_REPORT = 57
VIRTIO_NET_F_GUEST_HDRLEN = 59
VIRTIO_NET_F_RSS = 60
VIRTIO_NET_F_RSC_EXT = 61
VIRTIO_NET_F_STANDBY = 62
VIRTIO_NET_F_SPEED_DUPLEX = 63
VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO = 65
VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM = 66
VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO = 67
VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO_CSUM = 68

_PREFIXES = ("VIRTIO_NET_F_", "VIRTIO_RING_F_", "VIRTIO_F_", "VHOST_NET_F_", "VHOST_F_")

_BITS: dict[str, int] = {
    name: bit for name, bit in tuple(globals().items()) if name.startswith(_PREFIXES)
}

# Later names win, so bit 27 is what vhost-net means by it: it supplies and strips the
# header. That is no feature of the ring, and a guest must never see it as ANY_LAYOUT.
FEATURE_NAMES: dict[int, str] = {bit: name for name, bit in _BITS.items()} | {
    VHOST_F_LOG_ALL: "VHOST_F_LOG_ALL",
    VHOST_NET_F_VIRTIO_NET_HDR: "VHOST_NET_F_VIRTIO_NET_HDR",
}
"""Feature bit -> the kernel's name, as bits stand in the offer of a vhost-net descriptor."""


def feature_names(bits: int) -> list[str]:
    """Return the kernel's names of the bits set in the mask `bits`, lowest first.

    A bit without a name is ``"bit N"``. The mask may be of any width: bit 64 and above
    are those of VHOST_GET_FEATURES_ARRAY. Raises InvalidArgument if it is negative.
    """
    if bits < 0:
        raise InvalidArgument(f"feature mask {bits} is negative")
    return [
        FEATURE_NAMES.get(bit, f"bit {bit}") for bit in range(bits.bit_length()) if bits >> bit & 1
    ]


def feature_bit(name: str) -> int:
    """Return the number of the feature `name`, in any case, with or without its prefix.

    ``mrg_rxbuf``, ``VIRTIO_NET_F_MRG_RXBUF``, ``version_1``, ``any_layout`` and
    ``VHOST_F_LOG_ALL`` are all known; so is ``VIRTIO_F_EVENT_IDX``, the name that the
    specification has for VIRTIO_RING_F_EVENT_IDX. Raises InvalidArgument otherwise.
    """
    bit = _SHORT.get(_short(name))
    if bit is None:
        raise InvalidArgument(
            f"unknown feature {name!r}",
            hint="features are named as in linux/virtio_net.h, such as mrg_rxbuf or version_1",
        )
    return bit


def _short(name: str) -> str:
    short = name.upper()
    for prefix in _PREFIXES:
        if short.startswith(prefix):
            return short.removeprefix(prefix)
    return short


_SHORT = {_short(name): bit for name, bit in _BITS.items()}

VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4
VRING_USED_F_NO_NOTIFY = 1
VRING_AVAIL_F_NO_INTERRUPT = 1

VRING_DESC_ALIGN_SIZE = 16
VRING_AVAIL_ALIGN_SIZE = 2
VRING_USED_ALIGN_SIZE = 4


class vring_desc(Struct):
    """One descriptor (16 bytes): `addr` guest physical, `len` in bytes, VRING_DESC_F_*."""

    __slots__ = ()
    _fields_ = (("addr", _u64), ("len", _u32), ("flags", _u16), ("next", _u16))


class vring_avail(Struct):
    """Header of the available ring (4 bytes), before `num` u16 heads and the used_event."""

    __slots__ = ()
    _fields_ = (("flags", _u16), ("idx", _u16), ("ring", _u16 * 0))


class vring_used_elem(Struct):
    """One used element (8 bytes): head of the chain and the bytes written to it."""

    __slots__ = ()
    _fields_ = (("id", _u32), ("len", _u32))


class vring_used(Struct):
    """Header of the used ring (4 bytes), before `num` elements and the avail_event."""

    __slots__ = ()
    _fields_ = (("flags", _u16), ("idx", _u16), ("ring", vring_used_elem * 0))


def vring_desc_size(num: int) -> int:
    """Return the bytes of a descriptor table of `num` entries; it aligns to 16.

    Here and below, InvalidArgument is raised unless `num` is a power of two in 1..32768
    (virtio 1.2, section 2.7).
    """
    return 16 * _ring_size(num)


def vring_avail_size(num: int, *, event_idx: bool) -> int:
    """Return the bytes of an available ring of `num` entries; it aligns to 2.

    `event_idx` says whether VIRTIO_RING_F_EVENT_IDX adds the used_event at its end.
    """
    return 4 + 2 * _ring_size(num) + 2 * event_idx


def vring_used_size(num: int, *, event_idx: bool) -> int:
    """Return the bytes of a used ring of `num` entries; it aligns to 4.

    `event_idx` says whether VIRTIO_RING_F_EVENT_IDX adds the avail_event at its end.
    """
    return 4 + 8 * _ring_size(num) + 2 * event_idx


def _ring_size(num: int) -> int:
    if not 1 <= num <= 32768 or num & num - 1:
        raise InvalidArgument(f"ring size {num} is not a power of two in 1..32768")
    return num


VIRTIO_NET_HDR_F_NEEDS_CSUM = 1
VIRTIO_NET_HDR_F_DATA_VALID = 2
VIRTIO_NET_HDR_F_RSC_INFO = 4
VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM = 8

VIRTIO_NET_HDR_GSO_NONE = 0
VIRTIO_NET_HDR_GSO_TCPV4 = 1
VIRTIO_NET_HDR_GSO_UDP = 3
VIRTIO_NET_HDR_GSO_TCPV6 = 4
VIRTIO_NET_HDR_GSO_UDP_L4 = 5
VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4 = 0x20
VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6 = 0x40
VIRTIO_NET_HDR_GSO_ECN = 0x80  # or-ed to one of the types above


class virtio_net_hdr(Struct):
    """Packet header of a legacy device without MRG_RXBUF (10 bytes).

    `hdr_len` is the bytes of all protocol headers, `gso_size` the bytes of one segment;
    the checksum of what begins at `csum_start` goes `csum_offset` bytes further on.
    """

    __slots__ = ()
    _fields_ = (
        ("flags", _u8),
        ("gso_type", _u8),
        ("hdr_len", _u16),
        ("gso_size", _u16),
        ("csum_start", _u16),
        ("csum_offset", _u16),
    )


class virtio_net_hdr_mrg_rxbuf(Struct):
    """Packet header of a legacy device with MRG_RXBUF (12 bytes)."""

    __slots__ = ()
    _fields_ = (("hdr", virtio_net_hdr), ("num_buffers", _u16))


class virtio_net_hdr_v1(Struct):
    """Packet header with VERSION_1 (12 bytes): the same bytes as virtio_net_hdr_mrg_rxbuf.

    The header's other names for the checksum words, `csum` and `rsc`, are left out.
    """

    __slots__ = ()
    _fields_ = (*virtio_net_hdr._fields_, ("num_buffers", _u16))


class virtio_net_hdr_v1_hash(Struct):
    """Packet header with HASH_REPORT (20 bytes); older headers have the hash as one field."""

    __slots__ = ()
    _fields_ = (
        ("hdr", virtio_net_hdr_v1),
        ("hash_value_lo", _u16),
        ("hash_value_hi", _u16),
        ("hash_report", _u16),
        ("padding", _u16),
    )


class virtio_net_hdr_v1_hash_tunnel(Struct):
    """Packet header with GUEST_UDP_TUNNEL_GSO or HOST_UDP_TUNNEL_GSO (24 bytes)."""

    __slots__ = ()
    _fields_ = (
        ("hash_hdr", virtio_net_hdr_v1_hash),
        ("outer_th_offset", _u16),
        ("inner_nh_offset", _u16),
    )


VIRTIO_NET_S_LINK_UP = 1
VIRTIO_NET_S_ANNOUNCE = 2


class virtio_net_config(Struct):
    """Configuration space of the device (24 bytes); `speed` in Mbit/s, `mtu` in bytes."""

    __slots__ = ()
    _fields_ = (
        ("mac", _u8 * 6),
        ("status", _u16),
        ("max_virtqueue_pairs", _u16),
        ("mtu", _u16),
        ("speed", _u32),
        ("duplex", _u8),
        ("rss_max_key_size", _u8),
        ("rss_max_indirection_table_length", _u16),
        ("supported_hash_types", _u32),
    )


class virtio_net_ctrl_hdr(Struct):
    """First two bytes of a control command; `class` is a Python keyword, so give it by position."""

    __slots__ = ()
    _fields_ = (("class", _u8), ("cmd", _u8))


class virtio_net_ctrl_mq(Struct):
    """Payload of VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET (2 bytes)."""

    __slots__ = ()
    _fields_ = (("virtqueue_pairs", _u16),)


VIRTIO_NET_OK = 0
VIRTIO_NET_ERR = 1

VIRTIO_NET_CTRL_RX = 0
VIRTIO_NET_CTRL_RX_PROMISC = 0
VIRTIO_NET_CTRL_RX_ALLMULTI = 1
VIRTIO_NET_CTRL_RX_ALLUNI = 2
VIRTIO_NET_CTRL_RX_NOMULTI = 3
VIRTIO_NET_CTRL_RX_NOUNI = 4
VIRTIO_NET_CTRL_RX_NOBCAST = 5

VIRTIO_NET_CTRL_MAC = 1
VIRTIO_NET_CTRL_MAC_TABLE_SET = 0
VIRTIO_NET_CTRL_MAC_ADDR_SET = 1

VIRTIO_NET_CTRL_VLAN = 2
VIRTIO_NET_CTRL_VLAN_ADD = 0
VIRTIO_NET_CTRL_VLAN_DEL = 1

VIRTIO_NET_CTRL_ANNOUNCE = 3
VIRTIO_NET_CTRL_ANNOUNCE_ACK = 0

VIRTIO_NET_CTRL_MQ = 4
VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET = 0
VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN = 1
VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX = 0x8000

VIRTIO_NET_CTRL_GUEST_OFFLOADS = 5
VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET = 0
