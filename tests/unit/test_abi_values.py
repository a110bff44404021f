"""The numbers themselves, written down: a host without a compiler checks these at least."""

from __future__ import annotations

import ctypes

import pytest

from vhostctl.abi import tun, vhost, virtio
from vhostctl.abi.ioctl import Request
from vhostctl.abi.layout import Struct, members

VHOST_NUMBERS: list[tuple[Request, int, type | None]] = [
    (vhost.VHOST_GET_FEATURES, 0x8008AF00, ctypes.c_uint64),
    (vhost.VHOST_SET_FEATURES, 0x4008AF00, ctypes.c_uint64),
    (vhost.VHOST_SET_OWNER, 0xAF01, None),
    (vhost.VHOST_RESET_OWNER, 0xAF02, None),
    (vhost.VHOST_SET_MEM_TABLE, 0x4008AF03, vhost.vhost_memory),
    (vhost.VHOST_SET_LOG_BASE, 0x4008AF04, ctypes.c_uint64),
    (vhost.VHOST_SET_LOG_FD, 0x4004AF07, ctypes.c_int),
    (vhost.VHOST_NEW_WORKER, 0x8004AF08, vhost.vhost_worker_state),
    (vhost.VHOST_FREE_WORKER, 0x4004AF09, vhost.vhost_worker_state),
    (vhost.VHOST_SET_VRING_NUM, 0x4008AF10, vhost.vhost_vring_state),
    (vhost.VHOST_SET_VRING_ADDR, 0x4028AF11, vhost.vhost_vring_addr),
    (vhost.VHOST_SET_VRING_BASE, 0x4008AF12, vhost.vhost_vring_state),
    (vhost.VHOST_GET_VRING_BASE, 0xC008AF12, vhost.vhost_vring_state),
    (vhost.VHOST_SET_VRING_ENDIAN, 0x4008AF13, vhost.vhost_vring_state),
    (vhost.VHOST_GET_VRING_ENDIAN, 0x4008AF14, vhost.vhost_vring_state),
    (vhost.VHOST_ATTACH_VRING_WORKER, 0x4008AF15, vhost.vhost_vring_worker),
    (vhost.VHOST_GET_VRING_WORKER, 0xC008AF16, vhost.vhost_vring_worker),
    (vhost.VHOST_SET_VRING_KICK, 0x4008AF20, vhost.vhost_vring_file),
    (vhost.VHOST_SET_VRING_CALL, 0x4008AF21, vhost.vhost_vring_file),
    (vhost.VHOST_SET_VRING_ERR, 0x4008AF22, vhost.vhost_vring_file),
    (vhost.VHOST_SET_VRING_BUSYLOOP_TIMEOUT, 0x4008AF23, vhost.vhost_vring_state),
    (vhost.VHOST_GET_VRING_BUSYLOOP_TIMEOUT, 0x4008AF24, vhost.vhost_vring_state),
    (vhost.VHOST_SET_BACKEND_FEATURES, 0x4008AF25, ctypes.c_uint64),
    (vhost.VHOST_GET_BACKEND_FEATURES, 0x8008AF26, ctypes.c_uint64),
    (vhost.VHOST_NET_SET_BACKEND, 0x4008AF30, vhost.vhost_vring_file),
    (vhost.VHOST_GET_FEATURES_ARRAY, 0x8008AF83, vhost.vhost_features_array),
    (vhost.VHOST_SET_FEATURES_ARRAY, 0x4008AF83, vhost.vhost_features_array),
    (vhost.VHOST_SET_FORK_FROM_OWNER, 0x4001AF84, ctypes.c_uint8),
    (vhost.VHOST_GET_FORK_FROM_OWNER, 0x8001AF85, ctypes.c_uint8),
]

# number, type behind the third argument, passed by value
TUN_NUMBERS: list[tuple[Request, int, type | None, bool]] = [
    (tun.TUNSETDEBUG, 0x400454C9, ctypes.c_int, True),
    (tun.TUNSETIFF, 0x400454CA, tun.ifreq, False),
    (tun.TUNSETPERSIST, 0x400454CB, ctypes.c_int, True),
    (tun.TUNSETOWNER, 0x400454CC, ctypes.c_uint, True),
    (tun.TUNSETLINK, 0x400454CD, ctypes.c_int, True),
    (tun.TUNSETGROUP, 0x400454CE, ctypes.c_uint, True),
    (tun.TUNGETFEATURES, 0x800454CF, ctypes.c_uint, False),
    (tun.TUNSETOFFLOAD, 0x400454D0, ctypes.c_uint, True),
    (tun.TUNGETIFF, 0x800454D2, tun.ifreq, False),
    (tun.TUNGETSNDBUF, 0x800454D3, ctypes.c_int, False),
    (tun.TUNSETSNDBUF, 0x400454D4, ctypes.c_int, False),
    (tun.TUNGETVNETHDRSZ, 0x800454D7, ctypes.c_int, False),
    (tun.TUNSETVNETHDRSZ, 0x400454D8, ctypes.c_int, False),
    (tun.TUNSETQUEUE, 0x400454D9, tun.ifreq, False),
    (tun.TUNSETIFINDEX, 0x400454DA, ctypes.c_uint, False),
    (tun.TUNSETVNETLE, 0x400454DC, ctypes.c_int, False),
    (tun.TUNGETVNETLE, 0x800454DD, ctypes.c_int, False),
    (tun.TUNSETVNETBE, 0x400454DE, ctypes.c_int, False),
    (tun.TUNGETVNETBE, 0x800454DF, ctypes.c_int, False),
    (tun.TUNSETSTEERINGEBPF, 0x800454E0, ctypes.c_int, False),
    (tun.TUNSETFILTEREBPF, 0x800454E1, ctypes.c_int, False),
    (tun.TUNSETCARRIER, 0x400454E2, ctypes.c_int, False),
    (tun.TUNGETDEVNETNS, 0x54E3, None, False),
]

# struct, bytes, offset of each field
LAYOUTS: list[tuple[type[Struct], int, dict[str, int]]] = [
    (vhost.vhost_vring_state, 8, {"index": 0, "num": 4}),
    (vhost.vhost_vring_file, 8, {"index": 0, "fd": 4}),
    (
        vhost.vhost_vring_addr,
        40,
        {
            "index": 0,
            "flags": 4,
            "desc_user_addr": 8,
            "used_user_addr": 16,
            "avail_user_addr": 24,
            "log_guest_addr": 32,
        },
    ),
    (vhost.vhost_worker_state, 4, {"worker_id": 0}),
    (vhost.vhost_vring_worker, 8, {"index": 0, "worker_id": 4}),
    (vhost.vhost_iotlb_msg, 32, {"iova": 0, "size": 8, "uaddr": 16, "perm": 24, "type": 25}),
    (vhost.vhost_msg, 72, {"type": 0, "iotlb": 8, "padding": 8}),
    (vhost.vhost_msg_v2, 72, {"type": 0, "asid": 4, "iotlb": 8, "padding": 8}),
    (
        vhost.vhost_memory_region,
        32,
        {"guest_phys_addr": 0, "memory_size": 8, "userspace_addr": 16, "flags_padding": 24},
    ),
    (vhost.vhost_memory, 8, {"nregions": 0, "padding": 4, "regions": 8}),
    (vhost.vhost_features_array, 8, {"count": 0, "features": 8}),
    (virtio.vring_desc, 16, {"addr": 0, "len": 8, "flags": 12, "next": 14}),
    (virtio.vring_avail, 4, {"flags": 0, "idx": 2, "ring": 4}),
    (virtio.vring_used_elem, 8, {"id": 0, "len": 4}),
    (virtio.vring_used, 4, {"flags": 0, "idx": 2, "ring": 4}),
    (
        virtio.virtio_net_hdr,
        10,
        {
            "flags": 0,
            "gso_type": 1,
            "hdr_len": 2,
            "gso_size": 4,
            "csum_start": 6,
            "csum_offset": 8,
        },
    ),
    (virtio.virtio_net_hdr_mrg_rxbuf, 12, {"hdr": 0, "num_buffers": 10}),
    (
        virtio.virtio_net_hdr_v1,
        12,
        {
            "flags": 0,
            "gso_type": 1,
            "hdr_len": 2,
            "gso_size": 4,
            "csum_start": 6,
            "csum_offset": 8,
            "num_buffers": 10,
        },
    ),
    (
        virtio.virtio_net_hdr_v1_hash,
        20,
        {"hdr": 0, "hash_value_lo": 12, "hash_value_hi": 14, "hash_report": 16, "padding": 18},
    ),
    (
        virtio.virtio_net_hdr_v1_hash_tunnel,
        24,
        {"hash_hdr": 0, "outer_th_offset": 20, "inner_nh_offset": 22},
    ),
    (
        virtio.virtio_net_config,
        24,
        {
            "mac": 0,
            "status": 6,
            "max_virtqueue_pairs": 8,
            "mtu": 10,
            "speed": 12,
            "duplex": 16,
            "rss_max_key_size": 17,
            "rss_max_indirection_table_length": 18,
            "supported_hash_types": 20,
        },
    ),
    (virtio.virtio_net_ctrl_hdr, 2, {"class": 0, "cmd": 1}),
    (virtio.virtio_net_ctrl_mq, 2, {"virtqueue_pairs": 0}),
    (tun.ifreq, 40, {"ifr_name": 0, "ifr_flags": 16, "ifr_ifindex": 16, "_unused": 16}),
]


@pytest.mark.parametrize(
    ("request_", "number", "argument"), VHOST_NUMBERS, ids=[row[0].name for row in VHOST_NUMBERS]
)
def test_vhost_request(request_: Request, number: int, argument: type | None) -> None:
    assert (request_.number, request_.argument) == (number, argument)
    assert not request_.by_value


@pytest.mark.parametrize(
    ("request_", "number", "argument", "by_value"),
    TUN_NUMBERS,
    ids=[row[0].name for row in TUN_NUMBERS],
)
def test_tun_request(request_: Request, number: int, argument: type | None, by_value: bool) -> None:
    assert (request_.number, request_.argument) == (number, argument)
    assert request_.by_value is by_value


@pytest.mark.parametrize("module", [vhost, tun])
def test_every_request_carries_its_own_name_and_is_listed_here(module: object) -> None:
    found = {name: value for name, value in vars(module).items() if isinstance(value, Request)}
    assert {name: request.name for name, request in found.items()} == {name: name for name in found}
    written_down = {row[0].name for row in VHOST_NUMBERS} | {row[0].name for row in TUN_NUMBERS}
    assert found.keys() <= written_down


def test_vhost_net_requests_are_all_of_them_once() -> None:
    listed = [request.name for request in vhost.VHOST_NET_REQUESTS]
    assert sorted(listed) == sorted(row[0].name for row in VHOST_NUMBERS)


@pytest.mark.parametrize(
    ("struct", "size", "offsets"), LAYOUTS, ids=[row[0].__name__ for row in LAYOUTS]
)
def test_layout(struct: type[Struct], size: int, offsets: dict[str, int]) -> None:
    assert ctypes.sizeof(struct) == size
    assert {name: getattr(struct, name).offset for name in members(struct)} == offsets


def test_every_struct_is_listed_here() -> None:
    mirrored = {
        value
        for module in (vhost, virtio, tun)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Struct) and value is not Struct
    }
    assert mirrored == {row[0] for row in LAYOUTS}


LINUX_6_1 = (
    "MRG_RXBUF NOTIFY_ON_EMPTY LOG_ALL VIRTIO_NET_HDR INDIRECT_DESC EVENT_IDX"
    " VERSION_1 ACCESS_PLATFORM"
)
LINUX_7_2 = LINUX_6_1 + " IN_ORDER RING_RESET GUEST_UDP_TUNNEL_GSO HOST_UDP_TUNNEL_GSO"


@pytest.mark.parametrize(
    ("offer", "names"), [(0x33D008000, LINUX_6_1), (0xA_0000010B_3D008000, LINUX_7_2)]
)
def test_names_of_what_kernels_offer(offer: int, names: str) -> None:
    assert [name.split("_F_", 1)[1] for name in virtio.feature_names(offer)] == names.split()


def test_bits_that_cannot_be_confused() -> None:
    assert virtio.VIRTIO_F_IN_ORDER == 35
    assert virtio.VIRTIO_F_RING_RESET == 40
    assert (virtio.VIRTIO_NET_F_GUEST_USO4, virtio.VIRTIO_NET_F_GUEST_USO6) == (54, 55)
    assert virtio.VIRTIO_NET_F_HOST_USO == 56
    assert virtio.VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM == 66
    assert virtio.VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO_CSUM == 68
    assert vhost.VHOST_BACKEND_F_IOTLB_MSG_V2 == 1
    assert vhost.VHOST_VRING_F_LOG == 0
    assert vhost.VHOST_FILE_UNBIND == -1
    assert (vhost.VHOST_FORK_OWNER_KTHREAD, vhost.VHOST_FORK_OWNER_TASK) == (0, 1)
    assert (tun.TUN_F_USO4, tun.TUN_F_USO6) == (0x20, 0x40)


@pytest.mark.parametrize(
    ("num", "desc", "avail", "used"),
    [(1, 16, 6, 12), (256, 4096, 516, 2052), (32768, 524288, 65540, 262148)],
)
def test_ring_sizes(num: int, desc: int, avail: int, used: int) -> None:
    assert virtio.vring_desc_size(num) == desc
    assert virtio.vring_avail_size(num, event_idx=False) == avail
    assert virtio.vring_avail_size(num, event_idx=True) == avail + 2
    assert virtio.vring_used_size(num, event_idx=False) == used
    assert virtio.vring_used_size(num, event_idx=True) == used + 2
    assert virtio.VRING_DESC_ALIGN_SIZE == 16
    assert virtio.VRING_AVAIL_ALIGN_SIZE == 2
    assert virtio.VRING_USED_ALIGN_SIZE == 4
