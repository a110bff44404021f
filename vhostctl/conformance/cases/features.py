"""Feature bits: which, when and by whom."""

from __future__ import annotations

from functools import partial

from vhostctl.abi import vhost, virtio
from vhostctl.conformance.case import case
from vhostctl.conformance.cases.support import BAD, ask, elsewhere, invalidate, owned, running
from vhostctl.conformance.target import Target
from vhostctl.host.vhost import RX, TX, VhostNet

LOG_ALL = 1 << vhost.VHOST_F_LOG_ALL
PLATFORM = 1 << virtio.VIRTIO_F_ACCESS_PLATFORM
ALWAYS = sum(
    1 << bit
    for bit in (
        virtio.VIRTIO_NET_F_MRG_RXBUF,
        virtio.VIRTIO_F_NOTIFY_ON_EMPTY,
        vhost.VHOST_F_LOG_ALL,
        vhost.VHOST_NET_F_VIRTIO_NET_HDR,
        virtio.VIRTIO_RING_F_INDIRECT_DESC,
        virtio.VIRTIO_RING_F_EVENT_IDX,
        virtio.VIRTIO_F_VERSION_1,
        virtio.VIRTIO_F_ACCESS_PLATFORM,
    )
)
MSG_V2 = 1 << vhost.VHOST_BACKEND_F_IOTLB_MSG_V2


def in_iotlb_mode(target: Target, device: VhostNet) -> bool:
    """Return whether the device takes IOTLB messages."""
    return target.refused(lambda: device.write_message(invalidate(0, 4096))) == ""


@case("GET_FEATURES offers the known bits and no other.")
def offer(target: Target) -> None:
    want = ALWAYS
    want |= target.flags.ring_reset << virtio.VIRTIO_F_RING_RESET
    want |= target.flags.in_order << virtio.VIRTIO_F_IN_ORDER
    target.check("bits", hex(target.open().get_features()), hex(want))


@case("GET_FEATURES is the same before and after SET_FEATURES, SET_OWNER and RESET_OWNER.")
def offer_stays(target: Target) -> None:
    device = target.open()
    first = device.get_features()
    device.set_features(0)
    device.set_owner()
    target.check("owned", device.get_features() == first, True)
    device.reset_owner()
    target.check("reset", device.get_features() == first, True)


@case("GET_FEATURES and SET_FEATURES with a bad pointer are EFAULT, with an owner or without.")
def bad_pointer(target: Target) -> None:
    device = target.open()
    for when in ("unowned", "owned"):
        for request in (vhost.VHOST_GET_FEATURES, vhost.VHOST_SET_FEATURES):
            target.check(f"{when} {request.name}", ask(target, device, request, BAD), "EFAULT")
        if when == "unowned":
            device.set_owner()


@case("SET_FEATURES with a bit that is not offered is EOPNOTSUPP.")
def not_offered(target: Target) -> None:
    device = target.open()
    for bit in (0, virtio.VIRTIO_NET_F_MAC, virtio.VIRTIO_F_RING_PACKED, 36, 63):
        found = target.refused(partial(device.set_features, 1 << bit))
        target.check(f"bit {bit}", found, "EOPNOTSUPP")
        found = target.refused(partial(device.set_features, ALWAYS | 1 << bit))
        target.check(f"bit {bit} and good ones", found, "EOPNOTSUPP")


@case("SET_FEATURES that is refused changes nothing.")
def refused_changes_nothing(target: Target) -> None:
    device = owned(target)
    found = target.refused(lambda: device.set_features(PLATFORM | 1))
    target.check("refused", found, "EOPNOTSUPP")
    target.check("IOTLB mode", in_iotlb_mode(target, device), False)


@case("SET_FEATURES takes every offered bit by itself, and none.")
def each_bit(target: Target) -> None:
    device = target.open()
    offered = device.get_features()
    for bit in range(64):
        if offered >> bit & 1:
            found = target.refused(partial(device.set_features, 1 << bit))
            target.check(f"bit {bit}", found, "")
    target.check("none", target.refused(lambda: device.set_features(0)), "")
    target.check("all", target.refused(lambda: device.set_features(offered)), "")


@case("SET_FEATURES needs no owner, and works for another process than the owner.")
def anybody(target: Target) -> None:
    device = target.open()
    target.check("no owner", target.refused(lambda: device.set_features(0)), "")
    device.set_owner()
    found = elsewhere(lambda: target.refused(lambda: device.set_features(ALWAYS)))
    target.check("other process", found, "")


@case("What another process set with SET_FEATURES holds for the owner.", needs=("node",))
def anybody_counts(target: Target) -> None:
    device = owned(target)
    target.check("before", in_iotlb_mode(target, device), False)
    elsewhere(lambda: device.set_features(PLATFORM))
    target.check("after", in_iotlb_mode(target, device), True)


@case("SET_FEATURES works while rings run.")
def live(target: Target) -> None:
    rig = running(target)
    for bits in (0, ALWAYS & ~PLATFORM & ~LOG_ALL, rig.setup.features):
        target.check(hex(bits), target.refused(partial(rig.device.set_features, bits)), "")


@case("SET_FEATURES that is refused while rings run leaves them running.")
def live_refused(target: Target) -> None:
    rig = running(target)
    target.check("bit 0", target.refused(lambda: rig.device.set_features(1)), "EOPNOTSUPP")
    rig.tx.offer(rig.outgoing(1))
    target.check("sent", rig.sent(1), ["1x60"])


@case("LOG_ALL while a ring runs is EFAULT if the log is no memory, and fine if it is.")
def live_log(target: Target) -> None:
    rig = running(target)
    for queue in (rig.rx, rig.tx):
        queue.stop()
    rig.device.set_log_base(BAD)
    rig.start()
    with_log = rig.setup.features | LOG_ALL
    target.check("bad log", target.refused(lambda: rig.device.set_features(with_log)), "EFAULT")
    rig.device.set_log_base(rig.memory.hva(rig.alloc(4096), 4096))
    target.check("good log", target.refused(lambda: rig.device.set_features(with_log)), "")


@case("LOG_ALL without a log is accepted while no ring runs.")
def stopped_log(target: Target) -> None:
    device = owned(target)
    device.set_log_base(BAD)
    target.check("bad log", target.refused(lambda: device.set_features(LOG_ALL)), "")


@case("ACCESS_PLATFORM puts the device into IOTLB mode, with an owner or without.")
def platform(target: Target) -> None:
    for when in ("unowned", "owned"):
        device = target.open() if when == "unowned" else owned(target)
        target.check(f"{when}, before", in_iotlb_mode(target, device), False)
        device.set_features(PLATFORM)
        target.check(f"{when}, after", in_iotlb_mode(target, device), True)


@case("SET_FEATURES without ACCESS_PLATFORM leaves IOTLB mode.", needs=("platform_toggles",))
def platform_off(target: Target) -> None:
    device = owned(target)
    for turn in (1, 2):
        device.set_features(PLATFORM)
        target.check(f"on, {turn}", in_iotlb_mode(target, device), True)
        device.set_features(0)
        target.check(f"off, {turn}", in_iotlb_mode(target, device), False)


@case("SET_FEATURES without an owner forgets what was set before, as later ones do.")
def replaced(target: Target) -> None:
    device = target.open()
    device.set_features(ALWAYS)
    device.set_features(0)
    device.set_owner()
    target.check("IOTLB mode", in_iotlb_mode(target, device), not target.flags.platform_toggles)


@case("The one backend feature on offer is IOTLB_MSG_V2.")
def backend_offer(target: Target) -> None:
    device = target.open()
    target.check("unowned", device.get_backend_features(), MSG_V2)
    device.set_owner()
    target.check("owned", device.get_backend_features(), MSG_V2)
    target.check("other process", elsewhere(device.get_backend_features), MSG_V2)


@case("SET_BACKEND_FEATURES takes what is offered and refuses the rest with EOPNOTSUPP.")
def backend_set(target: Target) -> None:
    device = target.open()
    for bits in (0, MSG_V2):
        found = target.refused(partial(device.set_backend_features, bits))
        target.check(f"{bits:#x}", found, "")
    for bits in (1, 1 << 2, 1 << 3, MSG_V2 | 1 << 4, 1 << 63):
        found = target.refused(partial(device.set_backend_features, bits))
        target.check(f"{bits:#x}", found, "EOPNOTSUPP")


@case("The requests for backend features with a bad pointer are EFAULT, also without an owner.")
def backend_pointer(target: Target) -> None:
    device = target.open()
    for request in (vhost.VHOST_GET_BACKEND_FEATURES, vhost.VHOST_SET_BACKEND_FEATURES):
        target.check(request.name, ask(target, device, request, BAD), "EFAULT")


@case("SET_BACKEND_FEATURES works while rings run, and for another process.")
def backend_live(target: Target) -> None:
    device = running(target).device
    for bits in (MSG_V2, 0):
        found = target.refused(partial(device.set_backend_features, bits))
        target.check(f"{bits:#x}", found, "")
    found = elsewhere(lambda: target.refused(lambda: device.set_backend_features(MSG_V2)))
    target.check("other process", found, "")


@case("Live changes of features leave base and backend of the rings alone.")
def live_keeps(target: Target) -> None:
    rig = running(target)
    rig.tx.offer(rig.outgoing(1))
    rig.sent(1)
    rig.device.set_features(0)
    rig.device.set_features(rig.setup.features)
    target.check("bases", [rig.device.get_vring_base(queue) for queue in (RX, TX)], [0, 1])
