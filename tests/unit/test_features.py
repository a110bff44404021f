"""Negotiation: every bit has one outcome, and the rest follows from what was acknowledged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostctl.abi import tun, vhost, virtio
from vhostctl.control.features import DEVICE_BITS, Policy, mask, negotiate
from vhostctl.errors import NegotiationError

OLD_KERNEL = 0x33D008000  # what Linux 6.1's vhost-net offers
RING = mask(
    virtio.VIRTIO_NET_F_MRG_RXBUF, virtio.VIRTIO_RING_F_EVENT_IDX, virtio.VIRTIO_F_VERSION_1
)


def test_everything_on_offer_is_taken() -> None:
    result = negotiate(driver=RING, device=OLD_KERNEL)
    assert result.features == RING
    assert result.device_features == RING
    assert result.header_size == 12
    assert result.offload == 0
    assert result.absent == {}


@pytest.mark.parametrize(
    ("driver", "size"),
    [
        (0, 10),
        (mask(virtio.VIRTIO_NET_F_MRG_RXBUF), 12),
        (mask(virtio.VIRTIO_F_VERSION_1), 12),
        (mask(virtio.VIRTIO_RING_F_EVENT_IDX), 10),
    ],
)
def test_header_size_follows_from_the_acknowledged_bits(driver: int, size: int) -> None:
    assert negotiate(driver=driver, device=OLD_KERNEL).header_size == size


def test_a_refused_bit_is_absent_with_its_reason() -> None:
    policy = Policy.of([(virtio.VIRTIO_RING_F_EVENT_IDX, False)])
    result = negotiate(driver=RING, device=OLD_KERNEL, policy=policy)
    assert not result.features >> virtio.VIRTIO_RING_F_EVENT_IDX & 1
    assert result.absent == {virtio.VIRTIO_RING_F_EVENT_IDX: "switched off"}


def test_a_required_bit_that_is_missing_is_named() -> None:
    policy = Policy.of([(virtio.VIRTIO_F_IN_ORDER, True)])
    with pytest.raises(NegotiationError, match=r"VIRTIO_F_IN_ORDER \(the device does not offer"):
        negotiate(driver=RING, device=OLD_KERNEL, policy=policy)


@pytest.mark.parametrize(
    "bit",
    [vhost.VHOST_F_LOG_ALL, vhost.VHOST_NET_F_VIRTIO_NET_HDR, virtio.VIRTIO_F_ACCESS_PLATFORM],
)
def test_some_bits_are_never_acknowledged(bit: int) -> None:
    everything = (1 << 64) - 1
    result = negotiate(driver=everything, device=everything, others=everything)
    assert not result.features >> bit & 1
    assert result.absent[bit]


def test_offloads_come_from_the_tap_and_are_not_told_to_vhost() -> None:
    offload = mask(virtio.VIRTIO_NET_F_GUEST_CSUM, virtio.VIRTIO_NET_F_GUEST_TSO4)
    result = negotiate(driver=RING | offload, device=OLD_KERNEL, others=offload)
    assert result.features == RING | offload
    assert result.device_features == RING
    assert result.offload == tun.TUN_F_CSUM | tun.TUN_F_TSO4


BITS = st.integers(min_value=0, max_value=(1 << 70) - 1)


@given(driver=BITS, device=BITS, others=BITS, refused=BITS)
def test_each_known_bit_is_either_taken_or_explained(
    driver: int, device: int, others: int, refused: int
) -> None:
    result = negotiate(driver=driver, device=device, others=others, policy=Policy(refused=refused))
    assert result.features & ~driver == 0
    assert result.features & refused == 0
    assert result.features & ~((device & DEVICE_BITS) | (others & ~DEVICE_BITS)) == 0
    assert result.device_features == result.features & DEVICE_BITS
    assert mask(*result.absent) == driver & ~result.features
