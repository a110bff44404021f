"""What negotiation says is what kernel and device take, and what the peers got wrong."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import socket
import struct
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from vhostctl.abi import tun, virtio
from vhostctl.abi.ioctl import Request
from vhostctl.abi.vhost import VHOST_F_LOG_ALL
from vhostctl.control.features import DEVICE_BITS, Policy, mask, negotiate, tap_features
from vhostctl.control.probe import probe
from vhostctl.control.session import Session
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import KernelError, NegotiationError
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap, TapQueue
from vhostctl.host.vhost import VhostNet

pytestmark = pytest.mark.usefixtures("nothing_left")

F = virtio.feature_bit
EVERYTHING = (1 << 128) - 1
RING = mask(F("mrg_rxbuf"), F("event_idx"), F("version_1"))
GUEST = [F(f"guest_{name}") for name in ("csum", "tso4", "tso6", "ecn", "ufo", "uso4", "uso6")]
SIOCETHTOOL, ETHTOOL_GTXCSUM, ETHTOOL_GTSO = 0x8946, 0x16, 0x1E  # linux/sockios.h, ethtool.h


class Recording(VhostNet):
    """A device that remembers which features it was told, and how long arguments were."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.told: list[int] = []
        self.lengths: dict[str, int] = {}

    def set_features(self, features: int) -> None:
        self.told.append(features)
        super().set_features(features)

    def request(self, request: Request, argument: object = None, queue: int | None = None) -> int:
        if argument is not None:
            self.lengths[request.name] = len(memoryview(argument).cast("B"))  # type: ignore[arg-type]
        return super().request(request, argument, queue)


@pytest.fixture
def vhost(device: str) -> Iterator[Recording]:
    with Recording.at(device) as opened:
        yield opened


@pytest.fixture
def tap(namespace: NetNamespace) -> Iterator[Tap]:
    with namespace.run(lambda: Tap.open("tap0")) as opened:
        yield opened


@pytest.fixture
def queue(tap: Tap) -> TapQueue:
    return tap.queues[0]


def offered_to_host(namespace: NetNamespace) -> tuple[bool, bool]:
    """Return whether the host may leave checksums, and TCP segmentation, to the tap."""

    def ask() -> tuple[bool, bool]:
        answers = []
        with socket.socket() as any_socket:
            for command in (ETHTOOL_GTXCSUM, ETHTOOL_GTSO):
                value = (ctypes.c_uint32 * 2)(command, 0)
                request = struct.pack("16sP16x", b"tap0", ctypes.addressof(value))
                fcntl.ioctl(any_socket, SIOCETHTOOL, request)
                answers.append(bool(value[1]))
        return answers[0], answers[1]

    return namespace.run(ask)


def test_the_tap_is_asked_by_trying(namespace: NetNamespace, queue: TapQueue) -> None:
    taken = queue.offloads()
    assert taken & 0xF == tun.TUN_F_CSUM | tun.TUN_F_TSO4 | tun.TUN_F_TSO6 | tun.TUN_F_TSO_ECN
    assert offered_to_host(namespace) == (False, False)
    queue.set_offload(taken)
    assert offered_to_host(namespace) == (True, True)
    for flag in (1 << bit for bit in range(7)):
        if not taken & flag:
            with pytest.raises(KernelError) as caught:
                queue.set_offload(taken | flag)
            assert caught.value.errno == errno.EINVAL


def test_every_offload_that_negotiation_can_give_is_taken(
    vhost: VhostNet, namespace: NetNamespace, queue: TapQueue
) -> None:
    tap = tap_features(queue.offloads())
    seen = set()
    for chosen in itertools.product((False, True), repeat=len(GUEST)):
        driver = RING | mask(*itertools.compress(GUEST, chosen))
        result = negotiate(driver=driver, device=vhost.get_features(), tap=tap)
        if result.offload not in seen:
            seen.add(result.offload)
            queue.set_offload(result.offload)
            tso = tun.TUN_F_TSO4 | tun.TUN_F_TSO6
            wanted = bool(result.offload & tun.TUN_F_CSUM), bool(result.offload & tso)
            assert offered_to_host(namespace) == wanted, hex(result.offload)
    # Without checksums nothing; with them each of TSO4, TSO6 and ECN that fits, UFO, USO.
    doubled = [bit for bit in (F("guest_ufo"), F("guest_uso4")) if tap >> bit & 1]
    assert len(seen) == 1 + 7 * 2 ** len(doubled)


def test_every_set_of_features_that_negotiation_can_give_is_taken(vhost: Recording) -> None:
    device = vhost.get_features()
    bits = [bit for bit in range(64) if device & DEVICE_BITS & mask(bit)]
    for chosen in itertools.product((False, True), repeat=len(bits)):
        driver = mask(*itertools.compress(bits, chosen))
        translating = bool(driver >> F("access_platform") & driver >> F("version_1") & 1)
        result = negotiate(driver=driver, device=device, translating=translating)
        assert bool(result.device_features >> F("access_platform") & 1) is translating
        vhost.set_features(result.device_features)


def told_by_a_session(vhost: Recording, tap: Tap) -> int:
    """Wire `tap` to `vhost`; return what was acknowledged."""
    with Session(SessionConfig(tap="tap0"), tap=tap, vhost=[vhost]) as session:
        session.start()
        return session.features


def test_bug_set_of_unacknowledged_bits(vhost: Recording, tap: Tap) -> None:
    features = told_by_a_session(vhost, tap)
    assert features
    assert vhost.told
    assert not any(told & ~features for told in vhost.told)


def test_bug_log_all_left_on(vhost: Recording, tap: Tap) -> None:
    assert vhost.get_features() >> VHOST_F_LOG_ALL & 1
    told_by_a_session(vhost, tap)
    assert not any(told >> VHOST_F_LOG_ALL & 1 for told in vhost.told)
    result = negotiate(driver=EVERYTHING, device=vhost.get_features(), vmm=EVERYTHING)
    assert not result.device_features >> VHOST_F_LOG_ALL & 1


def test_bug_offload_unrelated_to_the_acknowledged_bits(
    vhost: Recording, namespace: NetNamespace, tap: Tap
) -> None:
    """Somebody had the tap before and left everything on; our driver knows no offload."""
    tap.queues[0].set_offload(tap.queues[0].offloads())
    assert offered_to_host(namespace) == (True, True)
    told_by_a_session(vhost, tap)
    assert offered_to_host(namespace) == (False, False)


def test_bug_features_masked_away_that_vhost_does_not_report(
    vhost: Recording, queue: TapQueue
) -> None:
    vmm = mask(*map(F, ("mac", "status", "ctrl_vq", "ctrl_rx", "mq", "mtu", "guest_announce")))
    tap = tap_features(queue.offloads())
    device = vhost.get_features()
    assert not device & (vmm | tap)
    result = negotiate(driver=RING | tap | vmm, device=device, tap=tap, vmm=vmm)
    assert result.features == RING | tap | vmm
    assert result.absent == {}
    vhost.set_features(result.device_features)
    assert vhost.told == [RING]


def test_bug_packed_bit_lost_silently(vhost: Recording) -> None:
    packed = mask(F("ring_packed"))
    device = vhost.get_features()
    result = negotiate(driver=RING | packed, device=device | packed, vmm=packed)
    assert result.absent == {F("ring_packed"): "the kernel's vhost has no packed rings"}
    vhost.set_features(result.device_features)
    with pytest.raises(NegotiationError, match=r"VIRTIO_F_RING_PACKED .* no packed rings"):
        negotiate(driver=RING | packed, device=device, policy=Policy(required=packed))


def test_bug_iommu_bit_sent_without_iotlb(vhost: Recording, tap: Tap) -> None:
    access = F("access_platform")
    device = vhost.get_features()
    assert device >> access & 1
    result = negotiate(driver=RING | mask(access), device=device, vmm=mask(access))
    assert not result.device_features >> access & 1
    assert result.absent == {access: "nothing here answers IOTLB misses"}
    told_by_a_session(vhost, tap)
    assert not any(told >> access & 1 for told in vhost.told)


def test_bug_one_byte_probe_buffer(device: str) -> None:
    """A kernel that does not know a request reads a ring index, four bytes, from its argument."""
    opened: list[Recording] = []

    def at(name: str) -> VhostNet:
        opened.append(Recording.at(name))
        return opened[-1]

    known = probe(device, at).requests["VHOST_GET_FORK_FROM_OWNER"]
    with Recording.at(device) as owned:
        opened.append(owned)
        owned.set_owner()
        with nullcontext() if known else pytest.raises(KernelError, match="ENOTTY"):
            owned.get_fork_from_owner()
        with pytest.raises(KernelError, match="EBUSY" if known else "ENOTTY"):
            owned.set_fork_from_owner(True)
    for recorded in opened:
        assert "VHOST_GET_FORK_FROM_OWNER" in recorded.lengths
        assert {name: size for name, size in recorded.lengths.items() if size < 4} == {}
