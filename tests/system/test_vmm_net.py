"""The virtio network device of the VMM on a vhost-net, played by our own driver."""

from __future__ import annotations

import errno
import socket

import msgspec
import pytest
from pyroute2 import IPRoute

from tests.support.vmm_net import BITS, MAC, Rig
from tests.support.wired import NOTHING_LOST
from vhostctl.abi import virtio
from vhostctl.abi.tun import IFF_DETACH_QUEUE, TUN_F_CSUM
from vhostctl.control.features import mask
from vhostctl.control.rings import RingPlacement
from vhostctl.errors import InvalidArgument, KernelError, NegotiationError, VhostctlError
from vhostctl.host.tap import TapQueue
from vhostctl.host.vhost import VhostNet
from vhostctl.vmm.net import NetDevice
from vhostctl.vmm.netconfig import NetConfig
from vhostctl.vmm.virtio import Ring

pytestmark = pytest.mark.usefixtures("nothing_left")

MQ = (virtio.VIRTIO_NET_CTRL_MQ, virtio.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET)


def test_frames_pass_both_ways_and_again_after_a_reset(device: str) -> None:
    with Rig(device) as rig:
        for _ in range(3):
            rig.start()
            assert rig.exchange() == NOTHING_LOST
            rig.net.reset()
            assert not rig.net.running


def test_pairs_come_and_go_by_command(device: str) -> None:
    with Rig(device, 2) as rig:
        rig.start()
        flags = [bool(queue.flags() & IFF_DETACH_QUEUE) for queue in rig.tap.queues]
        assert flags == [False, True], "after a reset the first pair alone takes part"
        assert rig.exchange() == NOTHING_LOST
        assert rig.command(*MQ, data=b"\2\0") == virtio.VIRTIO_NET_OK
        assert rig.exchange(2) == NOTHING_LOST
        assert rig.command(*MQ, data=b"\1\0") == virtio.VIRTIO_NET_OK
        assert rig.exchange() == NOTHING_LOST
        for bad in (b"\0\0", b"\3\0", b"\1", b""):
            assert rig.command(*MQ, data=bad) == virtio.VIRTIO_NET_ERR


def test_a_driver_without_multiqueue_has_its_control_queue_third(device: str) -> None:
    features = BITS & ~mask(virtio.VIRTIO_NET_F_MQ)
    with Rig(device, 2, features) as rig:
        rig.start()
        assert rig.control == 2
        assert rig.net.kicks[2] is None
        assert rig.exchange() == NOTHING_LOST
        assert rig.command(*MQ, data=b"\2\0") == virtio.VIRTIO_NET_ERR
        promiscuous = (virtio.VIRTIO_NET_CTRL_RX, virtio.VIRTIO_NET_CTRL_RX_PROMISC)
        assert rig.command(*promiscuous, data=b"\1") == virtio.VIRTIO_NET_OK


def test_a_driver_may_leave_pairs_alone(device: str) -> None:
    with Rig(device, 3) as rig:
        rig.start(enable=2)
        assert rig.exchange() == NOTHING_LOST
        assert rig.command(*MQ, data=b"\3\0") == virtio.VIRTIO_NET_ERR
        assert rig.command(*MQ, data=b"\2\0") == virtio.VIRTIO_NET_OK
        assert rig.exchange(2) == NOTHING_LOST
        assert rig.tap.queues[2].flags() & IFF_DETACH_QUEUE
        state = rig.net.save()
        rig.net.reset()
        rig.net.restore(state, rig.rings)
        assert rig.exchange(2) == NOTHING_LOST
        assert rig.command(*MQ, data=b"\3\0") == virtio.VIRTIO_NET_ERR
        assert rig.command(*MQ, data=b"\1\0") == virtio.VIRTIO_NET_OK
        rig.net.reset()
        rig.start()
        assert rig.command(*MQ, data=b"\3\0") == virtio.VIRTIO_NET_OK
        assert rig.exchange(3) == NOTHING_LOST


def test_mac_and_announcement(device: str) -> None:
    with Rig(device) as rig:
        rig.start()
        assert rig.net.read_config(0, 8).hex() == MAC.replace(":", "") + "0100"
        set_mac = (virtio.VIRTIO_NET_CTRL_MAC, virtio.VIRTIO_NET_CTRL_MAC_ADDR_SET)
        assert rig.command(*set_mac, data=b"\2\0\0\0\0\7") == virtio.VIRTIO_NET_OK
        assert rig.command(*set_mac, data=b"\3\0\0\0\0\7") == virtio.VIRTIO_NET_ERR
        assert rig.net.read_config(0, 6) == b"\2\0\0\0\0\7"
        rig.net.announce()
        assert rig.transport.changes == 1
        assert rig.net.read_config(6, 2) == b"\3\0"
        done = (virtio.VIRTIO_NET_CTRL_ANNOUNCE, virtio.VIRTIO_NET_CTRL_ANNOUNCE_ACK)
        assert rig.command(*done) == virtio.VIRTIO_NET_OK
        assert rig.net.read_config(6, 2) == b"\1\0"


def test_a_driver_that_knows_no_announcements_is_not_asked_for_one(device: str) -> None:
    with Rig(device, features=BITS & ~mask(virtio.VIRTIO_NET_F_GUEST_ANNOUNCE)) as rig:
        rig.net.announce()
        rig.start()
        rig.net.announce()
        assert rig.net.read_config(6, 2) == b"\1\0"
        assert not rig.transport.changes


def test_the_link_goes_down_and_comes_back_with_the_pairs_that_were_asked_for(device: str) -> None:
    with Rig(device, 2) as rig:
        rig.start()
        rig.net.set_link(False)
        assert rig.net.read_config(6, 2) == b"\0\0"
        assert rig.command(*MQ, data=b"\2\0") == virtio.VIRTIO_NET_OK
        rig.net.set_link(True)
        assert rig.transport.changes == 2
        assert not rig.tap.queues[1].flags() & IFF_DETACH_QUEUE
        assert rig.exchange(2) == NOTHING_LOST


def test_the_guest_hears_of_its_link_though_a_pair_does_not_come_back(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: TapQueue) -> None:
        raise KernelError(errno.E2BIG, "TUNSETQUEUE", "tap0 queue 1")

    with Rig(device, 2) as rig:
        rig.start()
        rig.net.set_link(False)
        assert rig.command(*MQ, data=b"\2\0") == virtio.VIRTIO_NET_OK
        monkeypatch.setattr(TapQueue, "enable", refuse)
        with pytest.raises(KernelError, match="TUNSETQUEUE"):
            rig.net.set_link(True)
        assert rig.transport.changes == 2
        assert rig.exchange() == NOTHING_LOST


def test_a_tap_without_a_driver_takes_no_offloads(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    tell = TapQueue.set_offload

    def spy(queue: TapQueue, flags: int) -> None:
        told.append(flags)
        tell(queue, flags)

    monkeypatch.setattr(TapQueue, "set_offload", spy)
    with Rig(device, features=BITS | mask(virtio.VIRTIO_NET_F_GUEST_CSUM)) as rig:
        rig.start()
        assert told[-1] == TUN_F_CSUM
        state = rig.net.save()
        rig.net.reset()
        rig.net.restore(state, rig.rings)
        assert told[-1] == TUN_F_CSUM
        rig.net.reset()
        assert told[-1] == 0
        rig.start()
        rig.in_namespace(delete_tap)
        rig.net.reset()


def delete_tap() -> None:
    with IPRoute() as route:
        route.link("del", index=socket.if_nametoindex("tap0"))


def test_a_link_that_is_down_stays_so_over_a_reset(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached: list[int | None] = []
    attach = VhostNet.set_backend

    def spy(vhost: VhostNet, queue: int, fd: int | None) -> None:
        attached.append(fd)
        attach(vhost, queue, fd)

    monkeypatch.setattr(VhostNet, "set_backend", spy)
    with Rig(device) as rig:
        rig.net.set_link(False)
        rig.start()
        assert attached == [], "no frame passes, not even at first"
        assert rig.net.read_config(6, 2) == b"\0\0"
        rig.net.set_link(True)
        assert rig.exchange() == NOTHING_LOST


def test_suspended_and_resumed_in_the_middle(device: str) -> None:
    with Rig(device, 2) as rig:
        rig.start()
        assert rig.command(*MQ, data=b"\2\0") == virtio.VIRTIO_NET_OK
        assert rig.exchange(2) == NOTHING_LOST
        state = rig.net.save()
        rig.net.reset()
        rig.net.restore(state, rig.rings)
        assert rig.exchange(2) == NOTHING_LOST
        assert rig.command(*MQ, data=b"\1\0") == virtio.VIRTIO_NET_OK
        assert rig.exchange() == NOTHING_LOST


@pytest.mark.parametrize("where", [0xFFFF_FFFF_F000, 0x123, 32 << 20])
def test_rings_that_lie_nowhere_do_not_start(device: str, where: int) -> None:
    with Rig(device) as rig:
        rings: list[Ring] = [RingPlacement(64, where, where + 2048, where + 4096)] * 3
        assert rig.net.accept(rig.net.features & BITS)
        with pytest.raises(VhostctlError):
            rig.net.start(rig.net.features & BITS, rings)
        assert not rig.net.running
        with pytest.raises(InvalidArgument, match="queue 0 is not enabled"):
            rig.net.start(rig.net.features & BITS, [None] * 3)
        rig.start()
        assert rig.exchange() == NOTHING_LOST


def test_a_malformed_command_asks_for_a_reset(device: str) -> None:
    with Rig(device) as rig:
        rig.start()
        rig.commands.add(b"\0\0\1", flags=virtio.VRING_DESC_F_INDIRECT)
        rig.ring_control()
        assert rig.transport.broken
        assert rig.exchange() == NOTHING_LOST
        rig.net.reset()
        rig.start()
        assert rig.exchange() == NOTHING_LOST


def test_features_that_need_others_are_not_accepted(device: str) -> None:
    with Rig(device) as rig:
        assert not rig.net.accept(1 << virtio.VIRTIO_NET_F_HOST_TSO4)
        assert not rig.net.accept(1 << virtio.VIRTIO_F_RING_PACKED)
        assert not rig.net.accept(1 << virtio.VIRTIO_NET_F_GUEST_ANNOUNCE)
        assert rig.net.accept(rig.net.features)
        assert rig.net.accept(0)


def test_closed_twice(device: str) -> None:
    with Rig(device) as rig:
        net = NetDevice(rig.space, rig.tap, rig.vhost, NetConfig(MAC))
        net.close()
        net.close()


@pytest.mark.parametrize(
    ("size", "mtu", "what"), [(100, None, "size 100"), (256, 67, "MTU"), (256, 65536, "MTU")]
)
def test_what_no_driver_takes_is_refused(size: int, mtu: int | None, what: str) -> None:
    with pytest.raises(InvalidArgument, match=what):
        NetConfig(MAC, mtu, size)


def test_a_pair_that_cannot_be_enabled_leaves_those_that_were(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    enable = TapQueue.enable

    def refuse_the_last(queue: TapQueue) -> None:
        if queue is rig.tap.queues[2]:
            raise KernelError(errno.E2BIG, "TUNSETQUEUE", "tap0 queue 2")
        enable(queue)

    def off() -> list[bool]:
        return [bool(queue.flags() & IFF_DETACH_QUEUE) for queue in rig.tap.queues]

    with Rig(device, 3) as rig:
        rig.start()
        with monkeypatch.context() as patch:
            patch.setattr(TapQueue, "enable", refuse_the_last)
            assert rig.command(*MQ, data=b"\3\0") == virtio.VIRTIO_NET_ERR
        assert off() == [False, True, True]
        rig.net.set_link(False)
        rig.net.set_link(True)
        assert off() == [False, True, True]
        assert rig.command(*MQ, data=b"\3\0") == virtio.VIRTIO_NET_OK
        assert rig.exchange(3) == NOTHING_LOST


def test_rings_that_cannot_be_stopped_ask_for_a_reset(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_backend = VhostNet.set_backend

    def refuse(vhost: VhostNet, queue: int, fd: int | None) -> None:
        if fd is None and queue:
            raise KernelError(errno.EIO, "VHOST_NET_SET_BACKEND", vhost.label)
        set_backend(vhost, queue, fd)

    with Rig(device) as rig:
        rig.start()
        with monkeypatch.context() as patch:
            patch.setattr(VhostNet, "set_backend", refuse)
            with pytest.raises(KernelError, match="VHOST_NET_SET_BACKEND"):
                rig.net.save()
        rig.net.go_on()
        assert rig.transport.broken


def test_a_state_that_does_not_fit_is_refused(device: str) -> None:
    with Rig(device) as rig:
        rig.start()
        state = rig.net.save()
        assert state.session is not None
        rig.net.reset()
        more = msgspec.structs.replace(state, features=state.features | 1 << 40)
        with pytest.raises(NegotiationError, match="the card had"):
            rig.net.restore(more, rig.rings)
        for change in ({"rings": ()}, {"order": (1 << 17,)}):
            session = msgspec.structs.replace(state.session, **change)
            with pytest.raises(InvalidArgument):
                rig.net.restore(msgspec.structs.replace(state, session=session), rig.rings)
        rig.net.restore(state, rig.rings)
        assert rig.exchange() == NOTHING_LOST
