"""Feature negotiation: who offers a bit, who takes it away, and what follows.

A network device that vhost-net serves has three makers. The vhost device knows the rings and
the transport (``linux/vhost.h``), the tap the offloads, and the VMM everything else that
virtio 1.2, section 5.1.3 lists. A bit is on offer only if its own maker offers it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from vhostctl.abi import tun, vhost, virtio
from vhostctl.errors import InvalidArgument, NegotiationError


def mask(*bits: int) -> int:
    """Return an integer with `bits` set."""
    return sum(1 << bit for bit in set(bits))


class Party(enum.StrEnum):
    """Who offers a bit, or takes it away."""

    DEVICE = "device"
    TAP = "tap"
    VMM = "VMM"
    DRIVER = "driver"
    POLICY = "policy"
    RULE = "rule"


_VMM_TRANSPORT = {
    virtio.VIRTIO_F_ORDER_PLATFORM,
    virtio.VIRTIO_F_SR_IOV,
    virtio.VIRTIO_F_NOTIF_CONFIG_DATA,
    virtio.VIRTIO_F_ADMIN_VQ,
}
_TRANSPORT = set(range(24, 50))  # set aside for rings and transport, virtio 1.2, section 2.2

DEVICE_BITS = mask(virtio.VIRTIO_NET_F_MRG_RXBUF, *(_TRANSPORT - _VMM_TRANSPORT))
"""Ring and transport bits: the vhost device must offer them and is told about them."""

_OFFLOADS = {
    virtio.VIRTIO_NET_F_GUEST_CSUM: tun.TUN_F_CSUM,
    virtio.VIRTIO_NET_F_GUEST_TSO4: tun.TUN_F_TSO4,
    virtio.VIRTIO_NET_F_GUEST_TSO6: tun.TUN_F_TSO6,
    virtio.VIRTIO_NET_F_GUEST_ECN: tun.TUN_F_TSO_ECN,
    virtio.VIRTIO_NET_F_GUEST_UFO: tun.TUN_F_UFO,
    virtio.VIRTIO_NET_F_GUEST_USO4: tun.TUN_F_USO4,
    virtio.VIRTIO_NET_F_GUEST_USO6: tun.TUN_F_USO6,
}
_FROM_GUEST = mask(
    virtio.VIRTIO_NET_F_CSUM,
    virtio.VIRTIO_NET_F_GSO,
    virtio.VIRTIO_NET_F_HOST_TSO4,
    virtio.VIRTIO_NET_F_HOST_TSO6,
    virtio.VIRTIO_NET_F_HOST_ECN,
    virtio.VIRTIO_NET_F_HOST_UFO,
)
_TUNNELS = {
    virtio.VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO,
    virtio.VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM,
    virtio.VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO,
    virtio.VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO_CSUM,
}
TAP_BITS = mask(*_OFFLOADS, virtio.VIRTIO_NET_F_HOST_USO, *_TUNNELS) | _FROM_GUEST
"""Offload bits: the tap must offer them, and TUNSETOFFLOAD is told about those of the guest."""

_LONG_HEADER = mask(virtio.VIRTIO_F_VERSION_1, virtio.VIRTIO_NET_F_MRG_RXBUF)
_ACCESS_PLATFORM = virtio.VIRTIO_F_ACCESS_PLATFORM
_ANOTHER_HEADER = "its packet header has another size than 10 or 12 bytes"

_MASKED = {
    vhost.VHOST_F_LOG_ALL: "the dirty log is switched on by itself, never negotiated",
    vhost.VHOST_NET_F_VIRTIO_NET_HDR: "the tap carries the header; vhost must not strip it",
    virtio.VIRTIO_F_RING_PACKED: "the kernel's vhost has no packed rings",
    virtio.VIRTIO_NET_F_HASH_REPORT: _ANOTHER_HEADER,
} | dict.fromkeys(_TUNNELS, _ANOTHER_HEADER)
"""Bits that are never acknowledged whoever offers them, and why."""

_CONTROL_QUEUE = (
    virtio.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    virtio.VIRTIO_NET_F_CTRL_RX,
    virtio.VIRTIO_NET_F_CTRL_VLAN,
    virtio.VIRTIO_NET_F_CTRL_RX_EXTRA,
    virtio.VIRTIO_NET_F_GUEST_ANNOUNCE,
    virtio.VIRTIO_NET_F_MQ,
    virtio.VIRTIO_NET_F_CTRL_MAC_ADDR,
    virtio.VIRTIO_NET_F_DEVICE_STATS,
    virtio.VIRTIO_NET_F_VQ_NOTF_COAL,
    virtio.VIRTIO_NET_F_NOTF_COAL,
    virtio.VIRTIO_NET_F_RSS,
)
_Groups = tuple[tuple[int, ...], ...]
_VERSION_1: _Groups = ((virtio.VIRTIO_F_VERSION_1,),)
_CTRL_VQ: _Groups = ((virtio.VIRTIO_NET_F_CTRL_VQ,),)
_CSUM: _Groups = ((virtio.VIRTIO_NET_F_CSUM,),)
_GUEST_CSUM: _Groups = ((virtio.VIRTIO_NET_F_GUEST_CSUM,),)
_HOST_TSO = (virtio.VIRTIO_NET_F_HOST_TSO4, virtio.VIRTIO_NET_F_HOST_TSO6)
_GUEST_TSO = (virtio.VIRTIO_NET_F_GUEST_TSO4, virtio.VIRTIO_NET_F_GUEST_TSO6)

_NEEDS: dict[int, _Groups] = {
    **dict.fromkeys(_CONTROL_QUEUE, _CTRL_VQ),
    **dict.fromkeys((virtio.VIRTIO_NET_F_GSO, *_HOST_TSO), _CSUM),
    **dict.fromkeys((virtio.VIRTIO_NET_F_HOST_UFO, virtio.VIRTIO_NET_F_HOST_USO), _CSUM),
    **dict.fromkeys((virtio.VIRTIO_NET_F_HOST_ECN, virtio.VIRTIO_NET_F_RSC_EXT), (_HOST_TSO,)),
    **dict.fromkeys((*_GUEST_TSO, virtio.VIRTIO_NET_F_GUEST_UFO), _GUEST_CSUM),
    virtio.VIRTIO_NET_F_GUEST_ECN: (_GUEST_TSO,),
    # TUNSETOFFLOAD refuses one of the two without the other.
    virtio.VIRTIO_NET_F_GUEST_USO4: (*_GUEST_CSUM, (virtio.VIRTIO_NET_F_GUEST_USO6,)),
    virtio.VIRTIO_NET_F_GUEST_USO6: (*_GUEST_CSUM, (virtio.VIRTIO_NET_F_GUEST_USO4,)),
}
"""What a bit needs, virtio 1.2, section 5.1.3.1: of each group at least one bit."""

_NEEDED = mask(*(bit for groups in (*_NEEDS.values(), _VERSION_1) for g in groups for bit in g))


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
class Outcome:
    """What became of one bit.

    `offered_by` are those of device, tap and VMM whose offer has the bit; only the offer of
    its own maker counts. `wanted` says whether driver or policy asked for it. `refused_by`
    took it away for `reason`; it is None, and `reason` empty, if the bit was accepted.
    """

    bit: int
    offered_by: tuple[Party, ...]
    wanted: bool
    refused_by: Party | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """The kernel's name of the bit, or ``bit N``."""
        return _name(self.bit)

    @property
    def accepted(self) -> bool:
        """Whether the bit was acknowledged."""
        return self.refused_by is None


@dataclass(frozen=True, slots=True)
class NegotiationResult:
    """What was agreed.

    `features` is what the driver acknowledged, `device_features` the part of it that
    VHOST_SET_FEATURES is told, `offload` the TUN_F_* flags for TUNSETOFFLOAD,
    `header_size` the bytes of virtio_net header before each frame. `outcomes` has every bit
    that was offered or asked for, lowest first.
    """

    features: int
    device_features: int
    offload: int
    header_size: int
    outcomes: tuple[Outcome, ...] = ()

    @property
    def absent(self) -> dict[int, str]:
        """Each bit that the driver knows or the policy requires and that is not there: why."""
        return {o.bit: o.reason for o in self.outcomes if o.wanted and not o.accepted}

    @property
    def endian(self) -> Literal["little", "native"]:
        """Byte order of the packet header: "little" is TUNSETVNETLE 1, "native" is 0."""
        return "little" if self.features >> virtio.VIRTIO_F_VERSION_1 & 1 else "native"

    def explain(self) -> list[tuple[str, str, str, str]]:
        """Return a row for each bit: name, offered by, accepted or refused by whom, reason."""
        return [
            (
                o.name,
                ", ".join(o.offered_by) or "nobody",
                "accepted" if o.refused_by is None else f"refused by {o.refused_by}",
                o.reason,
            )
            for o in self.outcomes
        ]


def tap_features(offloads: int) -> int:
    """Return what a tap offers whose kernel takes the TUN_F_* `offloads`; see `TapQueue`.

    Towards the guest that is one bit for each flag. Out of the guest a tap with IFF_VNET_HDR
    takes every frame that its kernel can segment, whatever TUNSETOFFLOAD was told: UDP in
    segments (USO) only where it also knows the flags for it, from Linux 6.2 on.
    """
    features = _FROM_GUEST | mask(*(bit for bit, flag in _OFFLOADS.items() if offloads & flag))
    both = tun.TUN_F_USO4 | tun.TUN_F_USO6
    return features | mask(virtio.VIRTIO_NET_F_HOST_USO) * (offloads & both == both)


def negotiate(
    *,
    driver: int,
    device: int,
    tap: int = 0,
    vmm: int = 0,
    policy: Policy | None = None,
    translating: bool = False,
    long_header: bool = True,
) -> NegotiationResult:
    """Intersect what the driver understands with what is on offer.

    `driver` are the bits that the guest's driver understands, `device` those of
    VHOST_GET_FEATURES or VHOST_GET_FEATURES_ARRAY, `tap` what `tap_features` returns, `vmm`
    what the VMM serves itself (MAC, control queue, multi-queue...).

    `translating` says that somebody answers IOTLB misses: VIRTIO_F_ACCESS_PLATFORM is then
    required, for a driver without it would go around the translation. `long_header` says
    whether the backend can carry 12 bytes of header; every tap can.

    Raises NegotiationError, which names the required bits that are missing and why, and
    InvalidArgument if a mask is negative.
    """
    policy = policy or Policy()
    required = policy.required | translating << _ACCESS_PLATFORM
    masks = (driver, device, tap, vmm, required, policy.refused)
    if min(masks) < 0:
        raise InvalidArgument(f"feature mask {min(masks)} is negative")
    offers = {Party.DEVICE: device, Party.TAP: tap, Party.VMM: vmm}
    table = _Table(driver, offers, policy.refused, translating, long_header)
    wanted = driver | required
    outcomes = table.settle(wanted)
    missing = [o for o in outcomes if required >> o.bit & 1 and not o.accepted]
    if missing:
        text = ", ".join(f"{o.name} ({o.reason})" for o in missing)
        raise NegotiationError(
            f"required features are missing: {text}", hint="see `vhostctl probe` for the offer"
        )
    features = mask(*(o.bit for o in outcomes if o.accepted))
    return NegotiationResult(
        features=features,
        device_features=features & DEVICE_BITS,
        offload=sum(flag for bit, flag in _OFFLOADS.items() if features >> bit & 1),
        header_size=12 if features & _LONG_HEADER else 10,
        outcomes=outcomes,
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """The input of one negotiation."""

    driver: int
    offers: dict[Party, int]
    refused: int
    translating: bool
    long_header: bool

    def settle(self, wanted: int) -> tuple[Outcome, ...]:
        """Decide about every bit that is offered or `wanted`."""
        everything = wanted
        for offer in self.offers.values():
            everything |= offer
        refusals = {
            bit: refusal
            for bit in _bits(everything | _NEEDED)
            if (refusal := self._refusal(bit)) is not None
        }
        accepted = everything & ~mask(*refusals)
        while lost := dict(_lost(accepted)):
            for bit, lacking in lost.items():
                causes = " or ".join(f"{_name(need)} ({refusals[need][1]})" for need in lacking)
                refusals[bit] = (Party.RULE, f"it needs {causes}")
            accepted &= ~mask(*lost)
        return tuple(
            Outcome(
                bit,
                tuple(party for party, offer in self.offers.items() if offer >> bit & 1),
                bool(wanted >> bit & 1),
                *refusals.get(bit, ()),
            )
            for bit in _bits(everything)
        )

    def _refusal(self, bit: int) -> tuple[Party, str] | None:
        """Return who takes `bit` away and why, other bits left aside."""
        maker = _maker(bit)
        if bit in _MASKED:
            return Party.RULE, _MASKED[bit]
        if bit == _ACCESS_PLATFORM and not self.translating:
            return Party.RULE, "nothing here answers IOTLB misses"
        if not self.offers[maker] >> bit & 1:
            return maker, f"the {maker} does not offer it"
        if not self.long_header and _LONG_HEADER >> bit & 1:
            return Party.TAP, "the tap cannot carry its header of 12 bytes"
        if not self.driver >> bit & 1:
            return Party.DRIVER, "the driver does not understand it"
        return (Party.POLICY, "switched off") if self.refused >> bit & 1 else None


def _maker(bit: int) -> Party:
    if DEVICE_BITS >> bit & 1:
        return Party.DEVICE
    return Party.TAP if TAP_BITS >> bit & 1 else Party.VMM


def _lost(accepted: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Return each bit of `accepted` that lacks what it needs, with the bits it lacks."""
    for bit in _bits(accepted):
        # A driver without VERSION_1 is a legacy one: it has 32 feature bits (virtio 1.2, 4.1.4.8).
        modern = _VERSION_1 if bit >= 32 else ()
        for group in modern + _NEEDS.get(bit, ()):
            if not accepted & mask(*group):
                yield bit, group
                break


def _bits(features: int) -> Iterator[int]:
    return (bit for bit in range(features.bit_length()) if features >> bit & 1)


def _name(bit: int) -> str:
    return virtio.FEATURE_NAMES.get(bit, f"bit {bit}")
