"""Feature negotiation: who offers a bit, who takes it away, and what follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vhostctl.abi import tun, vhost, virtio
from vhostctl.errors import NegotiationError


def mask(*bits: int) -> int:
    """Return an integer with `bits` set."""
    return sum(1 << bit for bit in set(bits))


DEVICE_BITS = mask(
    virtio.VIRTIO_F_NOTIFY_ON_EMPTY,
    virtio.VIRTIO_NET_F_MRG_RXBUF,
    virtio.VIRTIO_RING_F_INDIRECT_DESC,
    virtio.VIRTIO_RING_F_EVENT_IDX,
    virtio.VIRTIO_F_VERSION_1,
    virtio.VIRTIO_F_ACCESS_PLATFORM,
    virtio.VIRTIO_F_IN_ORDER,
    virtio.VIRTIO_F_RING_RESET,
)
"""Ring and transport bits: the vhost device must offer them and is told about them."""

_OFFLOADS = {
    virtio.VIRTIO_NET_F_GUEST_CSUM: tun.TUN_F_CSUM,
    virtio.VIRTIO_NET_F_GUEST_TSO4: tun.TUN_F_TSO4,
    virtio.VIRTIO_NET_F_GUEST_TSO6: tun.TUN_F_TSO6,
    virtio.VIRTIO_NET_F_GUEST_ECN: tun.TUN_F_TSO_ECN,
    virtio.VIRTIO_NET_F_GUEST_USO4: tun.TUN_F_USO4,
    virtio.VIRTIO_NET_F_GUEST_USO6: tun.TUN_F_USO6,
}

_MASKED = {
    vhost.VHOST_F_LOG_ALL: "the dirty log is switched on by itself, never negotiated",
    vhost.VHOST_NET_F_VIRTIO_NET_HDR: "the tap carries the header; vhost must not strip it",
    virtio.VIRTIO_F_ACCESS_PLATFORM: "nothing here answers IOTLB misses",
}
"""Bits that are never acknowledged whoever offers them, and why."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the user wants: bits that must be there, and bits that must not."""

    required: int = 0
    refused: int = 0

    @classmethod
    def of(cls, choices: Iterable[tuple[int, bool | None]]) -> Policy:
        """Build a policy from (bit, True: required, False: refused, None: if offered)."""
        chosen = list(choices)
        return cls(
            required=mask(*(bit for bit, choice in chosen if choice is True)),
            refused=mask(*(bit for bit, choice in chosen if choice is False)),
        )


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The outcome.

    `features` is what the driver acknowledged, `device_features` the part of it that
    VHOST_SET_FEATURES is told, `offload` the TUN_F_* flags for TUNSETOFFLOAD,
    `header_size` the bytes of virtio_net header before each frame, and `absent` says for
    every bit that the driver knows and did not get who took it away.
    """

    features: int
    device_features: int
    offload: int
    header_size: int
    absent: dict[int, str] = field(default_factory=dict)


def negotiate(
    *, driver: int, device: int, others: int = 0, policy: Policy | None = None
) -> Negotiated:
    """Intersect what the driver understands with what is on offer.

    `driver` are the bits that the guest's driver understands, `device` those of
    VHOST_GET_FEATURES, `others` what the tap and the VMM themselves offer (offloads, MAC,
    multi-queue). Raises NegotiationError, which names the required bits that are missing.
    """
    policy = policy or Policy()
    offered = (device & DEVICE_BITS) | (others & ~DEVICE_BITS)
    absent: dict[int, str] = {}
    features = 0
    for bit in range((driver | policy.required).bit_length()):
        if not (driver | policy.required) >> bit & 1:
            continue
        reason = _reason(bit, driver, offered, policy)
        if reason:
            absent[bit] = reason
        else:
            features |= 1 << bit
    missing = [bit for bit in absent if policy.required >> bit & 1]
    if missing:
        text = ", ".join(f"{virtio.FEATURE_NAMES.get(b, b)} ({absent[b]})" for b in missing)
        raise NegotiationError(
            f"required features are missing: {text}", hint="see `vhostctl probe` for the offer"
        )
    long_header = mask(virtio.VIRTIO_F_VERSION_1, virtio.VIRTIO_NET_F_MRG_RXBUF)
    return Negotiated(
        features=features,
        device_features=features & DEVICE_BITS,
        offload=sum(flag for bit, flag in _OFFLOADS.items() if features >> bit & 1),
        header_size=12 if features & long_header else 10,
        absent=absent,
    )


def _reason(bit: int, driver: int, offered: int, policy: Policy) -> str:
    if bit in _MASKED:
        return _MASKED[bit]
    if not offered >> bit & 1:
        return "the device does not offer it"
    if not driver >> bit & 1:
        return "the driver does not understand it"
    return "switched off" if policy.refused >> bit & 1 else ""
