"""Negotiation: every bit has one outcome, and the rest follows from what was acknowledged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostctl.abi import tun, vhost, virtio
from vhostctl.control.features import (
    DEVICE_BITS,
    TAP_BITS,
    NegotiationResult,
    Outcome,
    Party,
    Policy,
    mask,
    negotiate,
    tap_features,
)
from vhostctl.errors import InvalidArgument, NegotiationError

F = virtio.feature_bit
OLD_KERNEL = 0x33D008000  # what Linux 6.1's vhost-net offers
RING = mask(F("mrg_rxbuf"), F("event_idx"), F("version_1"))
EVERYTHING = (1 << 128) - 1
ALL_OFFLOADS = 0x7F

# Virtio 1.2, section 5.1.3.1, written out once more: the bit, and any one of what it requires.
REQUIREMENTS = [
    ("guest_tso4", ["guest_csum"]),
    ("guest_tso6", ["guest_csum"]),
    ("guest_ecn", ["guest_tso4", "guest_tso6"]),
    ("guest_ufo", ["guest_csum"]),
    ("guest_uso4", ["guest_csum"]),
    ("guest_uso6", ["guest_csum"]),
    ("host_tso4", ["csum"]),
    ("host_tso6", ["csum"]),
    ("host_ecn", ["host_tso4", "host_tso6"]),
    ("host_ufo", ["csum"]),
    ("host_uso", ["csum"]),
    ("gso", ["csum"]),
    ("ctrl_rx", ["ctrl_vq"]),
    ("ctrl_rx_extra", ["ctrl_vq"]),
    ("ctrl_vlan", ["ctrl_vq"]),
    ("ctrl_guest_offloads", ["ctrl_vq"]),
    ("guest_announce", ["ctrl_vq"]),
    ("mq", ["ctrl_vq"]),
    ("ctrl_mac_addr", ["ctrl_vq"]),
    ("notf_coal", ["ctrl_vq"]),
    ("vq_notf_coal", ["ctrl_vq"]),
    ("device_stats", ["ctrl_vq"]),
    ("rss", ["ctrl_vq"]),
    ("rsc_ext", ["host_tso4", "host_tso6"]),
    # Not of the specification: the tun driver takes both flags or none.
    ("guest_uso4", ["guest_uso6"]),
    ("guest_uso6", ["guest_uso4"]),
]
NEVER = [F("log_all"), vhost.VHOST_NET_F_VIRTIO_NET_HDR, F("ring_packed"), F("hash_report")]
NEVER += [65, 66, 67, 68]


def outcome(result: NegotiationResult, bit: int) -> Outcome:
    return next(o for o in result.outcomes if o.bit == bit)


def test_everything_on_offer_is_taken() -> None:
    result = negotiate(driver=RING, device=OLD_KERNEL)
    assert result.features == RING
    assert result.device_features == RING
    assert result.header_size == 12
    assert result.offload == 0
    assert result.absent == {}


@pytest.mark.parametrize(
    ("driver", "size", "endian"),
    [
        (0, 10, "native"),
        (mask(F("mrg_rxbuf")), 12, "native"),
        (mask(F("version_1")), 12, "little"),
        (mask(F("event_idx")), 10, "native"),
    ],
)
def test_header_follows_from_the_acknowledged_bits(driver: int, size: int, endian: str) -> None:
    result = negotiate(driver=driver, device=OLD_KERNEL)
    assert (result.header_size, result.endian) == (size, endian)


def test_a_backend_with_the_short_header_gets_no_bit_that_lengthens_it() -> None:
    result = negotiate(driver=RING, device=OLD_KERNEL, long_header=False)
    assert result.features == mask(F("event_idx"))
    assert result.header_size == 10
    for name in ("mrg_rxbuf", "version_1"):
        assert outcome(result, F(name)).refused_by is Party.TAP


def test_a_refused_bit_is_absent_with_its_reason() -> None:
    policy = Policy.of([(F("event_idx"), False)])
    result = negotiate(driver=RING, device=OLD_KERNEL, policy=policy)
    assert not result.features >> F("event_idx") & 1
    assert result.absent == {F("event_idx"): "switched off"}
    assert outcome(result, F("event_idx")).refused_by is Party.POLICY


def test_a_required_bit_that_is_missing_is_named() -> None:
    policy = Policy.of([(F("in_order"), True)])
    with pytest.raises(NegotiationError, match=r"VIRTIO_F_IN_ORDER \(the device does not offer"):
        negotiate(driver=RING, device=OLD_KERNEL, policy=policy)


@pytest.mark.parametrize("bit", NEVER)
def test_some_bits_are_never_acknowledged(bit: int) -> None:
    result = negotiate(driver=EVERYTHING, device=EVERYTHING, tap=EVERYTHING, vmm=EVERYTHING)
    assert not result.features >> bit & 1
    assert result.absent[bit]
    assert outcome(result, bit).refused_by is Party.RULE
    policy = Policy(required=mask(bit))
    with pytest.raises(NegotiationError, match=outcome(result, bit).name):
        negotiate(driver=EVERYTHING, device=EVERYTHING, tap=EVERYTHING, policy=policy)


@pytest.mark.parametrize(
    ("bit", "maker"),
    [
        ("mrg_rxbuf", Party.DEVICE),
        ("version_1", Party.DEVICE),
        ("in_order", Party.DEVICE),
        ("ring_reset", Party.DEVICE),
        ("notification_data", Party.DEVICE),
        ("csum", Party.TAP),
        ("guest_csum", Party.TAP),
        ("host_tso4", Party.TAP),
        ("mac", Party.VMM),
        ("status", Party.VMM),
        ("ctrl_vq", Party.VMM),
        ("mtu", Party.VMM),
        ("speed_duplex", Party.VMM),
        ("order_platform", Party.VMM),
    ],
)
def test_only_the_offer_of_its_maker_counts(bit: str, maker: Party) -> None:
    offers = {
        party: EVERYTHING & ~(mask(F(bit)) if party is maker else 0)
        for party in (Party.DEVICE, Party.TAP, Party.VMM)
    }
    result = negotiate(
        driver=EVERYTHING, device=offers[Party.DEVICE], tap=offers[Party.TAP], vmm=offers[Party.VMM]
    )
    found = outcome(result, F(bit))
    assert found.refused_by is maker
    assert found.reason == f"the {maker} does not offer it"
    assert set(found.offered_by) == offers.keys() - {maker}


@pytest.mark.parametrize(
    ("offloads", "offered", "missing"),
    [
        (0, ["csum", "gso", "host_tso4", "host_tso6", "host_ecn", "host_ufo"], ["host_uso"]),
        (tun.TUN_F_CSUM | tun.TUN_F_TSO4, ["guest_csum", "guest_tso4"], ["guest_tso6"]),
        (ALL_OFFLOADS & ~0x60, ["guest_ufo", "guest_ecn"], ["guest_uso4", "host_uso"]),
        (ALL_OFFLOADS, ["guest_uso4", "guest_uso6", "host_uso"], []),
    ],
)
def test_a_tap_offers_what_its_kernel_takes(
    offloads: int, offered: list[str], missing: list[str]
) -> None:
    features = tap_features(offloads)
    assert features & ~TAP_BITS == 0
    for names, expected in ((offered, 1), (missing, 0)):
        assert {name: features >> F(name) & 1 for name in names} == dict.fromkeys(names, expected)


def test_offloads_come_from_the_tap_and_are_not_told_to_vhost() -> None:
    tap = tap_features(ALL_OFFLOADS)
    result = negotiate(driver=RING | tap, device=OLD_KERNEL, tap=tap)
    assert result.features == RING | tap
    assert result.device_features == RING
    assert result.offload == ALL_OFFLOADS


@pytest.mark.parametrize(("bit", "groups"), REQUIREMENTS)
def test_a_bit_goes_with_what_it_needs(bit: str, groups: list[str]) -> None:
    """Both ways round: switched off it takes the bit along, and a bit required is missed."""
    policy = Policy(refused=mask(*map(F, groups)))
    offer = {"device": EVERYTHING, "tap": EVERYTHING, "vmm": EVERYTHING, "policy": policy}
    found = outcome(negotiate(driver=EVERYTHING, **offer), F(bit))  # type: ignore[arg-type]
    assert found.refused_by is Party.RULE
    for need in groups:
        assert f"{virtio.FEATURE_NAMES[F(need)]} (switched off)" in found.reason
    needs = " or ".join(rf"{virtio.FEATURE_NAMES[F(need)]} \(.*\)" for need in groups)
    with pytest.raises(NegotiationError, match=rf"{found.name} \(it needs {needs}\)"):
        negotiate(
            driver=EVERYTHING & ~mask(*map(F, groups)),
            device=EVERYTHING,
            tap=EVERYTHING,
            vmm=EVERYTHING,
            policy=Policy(required=mask(F(bit))),
        )


def test_a_chain_of_needs_is_followed_to_its_cause() -> None:
    tap = tap_features(ALL_OFFLOADS)
    with pytest.raises(NegotiationError) as caught:
        negotiate(
            driver=RING | tap & ~mask(F("guest_csum")),
            device=OLD_KERNEL,
            tap=tap,
            policy=Policy(required=mask(F("guest_ecn"))),
        )
    text = str(caught.value)
    assert text.startswith("required features are missing: VIRTIO_NET_F_GUEST_ECN (it needs")
    assert "VIRTIO_NET_F_GUEST_CSUM (the driver does not understand it)" in text


def test_a_legacy_driver_has_32_bits() -> None:
    result = negotiate(
        driver=EVERYTHING & ~mask(F("version_1")),
        device=EVERYTHING,
        tap=EVERYTHING,
        vmm=EVERYTHING,
    )
    assert result.features.bit_length() <= 32
    assert "VIRTIO_F_VERSION_1 (the driver does not understand it)" in result.absent[F("in_order")]


def test_translation_needs_all_three_to_know_it() -> None:
    access = mask(F("access_platform"))
    result = negotiate(driver=RING | access, device=OLD_KERNEL, translating=True)
    assert result.device_features == RING | access
    for driver, device in ((RING, OLD_KERNEL), (RING | access, OLD_KERNEL & ~access)):
        with pytest.raises(NegotiationError, match="VIRTIO_F_ACCESS_PLATFORM"):
            negotiate(driver=driver, device=device, translating=True)


def test_explain_has_a_row_for_each_bit() -> None:
    device = mask(F("event_idx"), F("log_all"), F("in_order"))
    result = negotiate(driver=mask(F("event_idx"), F("mac")), device=device)
    assert result.explain() == [
        ("VIRTIO_NET_F_MAC", "nobody", "refused by VMM", "the VMM does not offer it"),
        (
            "VHOST_F_LOG_ALL",
            "device",
            "refused by rule",
            "the dirty log is switched on by itself, never negotiated",
        ),
        ("VIRTIO_RING_F_EVENT_IDX", "device", "accepted", ""),
        ("VIRTIO_F_IN_ORDER", "device", "refused by driver", "the driver does not understand it"),
    ]
    assert result.absent == {F("mac"): "the VMM does not offer it"}


@pytest.mark.parametrize("party", ["driver", "device", "tap", "vmm"])
def test_a_negative_mask_is_refused(party: str) -> None:
    with pytest.raises(InvalidArgument, match="feature mask -1 is negative"):
        negotiate(**({"driver": RING, "device": OLD_KERNEL} | {party: -1}))  # type: ignore[arg-type]


BITS = st.one_of(
    st.integers(min_value=0, max_value=(1 << 70) - 1),
    # Nearly everything, so that chains of needs are long.
    st.sets(st.integers(0, 69), max_size=3).map(lambda bits: ((1 << 70) - 1) & ~mask(*bits)),
)


@given(driver=BITS, device=BITS, tap=BITS, vmm=BITS, refused=BITS)
def test_the_result_follows_from_the_offers(
    driver: int, device: int, tap: int, vmm: int, refused: int
) -> None:
    result = negotiate(
        driver=driver, device=device, tap=tap, vmm=vmm, policy=Policy(refused=refused)
    )
    features = result.features
    offered = device & DEVICE_BITS | tap & TAP_BITS | vmm & ~DEVICE_BITS & ~TAP_BITS
    assert features & ~(driver & offered & ~refused) == 0
    assert not features & mask(*NEVER, F("access_platform"))
    for bit, groups in REQUIREMENTS:
        assert not features >> F(bit) & 1 or features & mask(*map(F, groups)), bit
    assert features < 1 << 32 or features >> F("version_1") & 1

    assert result.device_features == features & DEVICE_BITS
    assert result.device_features & ~device == 0
    flags = {"guest_csum": 1, "guest_tso4": 2, "guest_tso6": 4, "guest_ecn": 8}
    flags |= {"guest_ufo": 0x10, "guest_uso4": 0x20, "guest_uso6": 0x40}
    assert result.offload == sum(flags[name] for name in flags if features >> F(name) & 1)


@given(driver=BITS, device=BITS, tap=BITS, vmm=BITS, refused=BITS)
def test_each_bit_has_one_outcome(
    driver: int, device: int, tap: int, vmm: int, refused: int
) -> None:
    result = negotiate(
        driver=driver, device=device, tap=tap, vmm=vmm, policy=Policy(refused=refused)
    )
    assert mask(*(o.bit for o in result.outcomes)) == driver | device | tap | vmm
    assert [o.bit for o in result.outcomes] == sorted(o.bit for o in result.outcomes)
    assert mask(*(o.bit for o in result.outcomes if o.accepted)) == result.features
    assert mask(*result.absent) == driver & ~result.features
    assert len(result.explain()) == len(result.outcomes)
    for found in result.outcomes:
        assert found.accepted == (found.reason == "")
        for party, offer in ((Party.DEVICE, device), (Party.TAP, tap), (Party.VMM, vmm)):
            assert (party in found.offered_by) == bool(offer >> found.bit & 1)


@given(driver=BITS, device=BITS, tap=BITS, vmm=BITS)
def test_no_more_is_taken_away_than_needed(driver: int, device: int, tap: int, vmm: int) -> None:
    """What was agreed is agreed again, and no bit that a rule took away could have stayed."""
    result = negotiate(driver=driver, device=device, tap=tap, vmm=vmm)
    again = negotiate(driver=result.features, device=device, tap=tap, vmm=vmm)
    assert again.features == result.features
    for found in result.outcomes:
        if found.refused_by is Party.RULE and found.reason.startswith("it needs"):
            lone = [groups for bit, groups in REQUIREMENTS if F(bit) == found.bit]
            lone += [["version_1"]] if found.bit >= 32 else []
            assert any(not result.features & mask(*map(F, groups)) for groups in lone)
