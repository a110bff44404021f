"""Feature masks, feature names, ring sizes and the tables with a flexible tail."""

from __future__ import annotations

import ctypes

import pytest

from vhostctl.abi import vhost, virtio
from vhostctl.errors import InvalidArgument


def test_memory_table_is_header_plus_regions() -> None:
    regions = [
        vhost.vhost_memory_region(
            guest_phys_addr=slot << 32, memory_size=4096, userspace_addr=slot << 12
        )
        for slot in range(64)
    ]
    table = vhost.vhost_memory_table(regions)
    assert isinstance(table, vhost.vhost_memory)
    assert ctypes.sizeof(table) == 2056
    assert bytes(table)[:8] == b"\x40" + bytes(7)
    assert bytes(table)[8:] == b"".join(bytes(region) for region in regions)
    assert ctypes.sizeof(vhost.vhost_memory_table(())) == 8


def test_features_table_round_trip() -> None:
    bits = 1 << 67 | 1 << 65 | 1 << 32
    table = vhost.vhost_features_table(bits)
    assert isinstance(table, vhost.vhost_features_array)
    assert bytes(table).hex() == "0200000000000000" + "0000000001000000" + "0a00000000000000"
    assert vhost.vhost_features_bits(table) == bits
    assert ctypes.sizeof(vhost.vhost_features_table(count=0)) == 8


@pytest.mark.parametrize(("bits", "count"), [(1 << 128, 2), (1, 0), (-1, 2), (0, -1)])
def test_features_that_do_not_fit_their_words(bits: int, count: int) -> None:
    with pytest.raises(InvalidArgument, match="does not fit"):
        vhost.vhost_features_table(bits, count)


@pytest.mark.parametrize("num", [0, -1, 3, 65536])
def test_ring_sizes_are_powers_of_two_up_to_32768(num: int) -> None:
    with pytest.raises(InvalidArgument, match=f"ring size {num} is not"):
        virtio.vring_desc_size(num)
    with pytest.raises(InvalidArgument):
        virtio.vring_avail_size(num, event_idx=True)
    with pytest.raises(InvalidArgument):
        virtio.vring_used_size(num, event_idx=True)


def test_feature_names_and_bits() -> None:
    assert virtio.feature_names(1 << 67 | 1 << 27 | 1 << 26 | 1 << 77) == [
        "VHOST_F_LOG_ALL",
        "VHOST_NET_F_VIRTIO_NET_HDR",
        "VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO",
        "bit 77",
    ]
    assert virtio.feature_names(0) == []
    with pytest.raises(InvalidArgument, match="negative"):
        virtio.feature_names(-1)


def test_every_feature_name_is_found_with_and_without_its_prefix() -> None:
    for bit, name in virtio.FEATURE_NAMES.items():
        assert virtio.feature_bit(name) == bit
        assert virtio.feature_bit(name.split("_F_", 1)[1].lower()) == bit


@pytest.mark.parametrize(
    ("name", "bit"),
    [
        ("mrg_rxbuf", 15),
        ("any_layout", 27),
        ("virtio_net_hdr", 27),
        ("event_idx", 29),
        ("VIRTIO_F_EVENT_IDX", 29),
        ("version_1", 32),
        ("iommu_platform", 33),
    ],
)
def test_feature_bit_by_its_usual_names(name: str, bit: int) -> None:
    assert virtio.feature_bit(name) == bit


@pytest.mark.parametrize("name", ["", "mrg_rxbuff", "VIRTIO_NET_F_", "VIRTIO_NET_HDR_F_NEEDS_CSUM"])
def test_unknown_feature_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="unknown feature"):
        virtio.feature_bit(name)
