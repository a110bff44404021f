"""What a session leaves to others: the tap, the caller's memory and devices, the next session."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pyroute2
import pytest

from tests.system.test_changes import config, prove, refusing
from vhostctl.abi import virtio
from vhostctl.control.addressspace import AddressSpace
from vhostctl.control.pair import VhostPair
from vhostctl.control.rings import place_rings
from vhostctl.control.session import Session
from vhostctl.control.snapshot import Snapshot
from vhostctl.control.states import State
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import InvalidArgument, KernelError, StateError
from vhostctl.host.eventfd import EventFd
from vhostctl.host.memory import GuestMemory, MappedRegion
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap, TapQueue
from vhostctl.host.vhost import RX, TX, VhostNet
from vhostctl.jobs.selftest import wire_config
from vhostctl.jobs.wire import Wire

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def wire(device: str) -> Iterator[Wire]:
    with Wire(wire_config(config(device, 2))) as wire:
        yield wire


def test_a_session_that_was_suspended_leaves_the_tap_to_its_successor(
    device: str, namespace: NetNamespace
) -> None:
    with (
        GuestMemory.anonymous(1 << 20) as memory,
        namespace.run(lambda: Tap.open("tap0")) as tap,
    ):
        space = AddressSpace(memory.regions)
        first = Session(config(device), memory=space, tap=tap)
        with first:
            first.start()
            document = first.suspend()
        assert tap.queues[0].vnet_hdr_size() == 12
        second = Session.resume(document, device, memory=space, tap=tap)
        with second:
            first.close()
            second.start()
            assert tap.queues[0].vnet_hdr_size() == 12
        assert tap.queues[0].vnet_hdr_size() == 10, "as it was before the first"


def test_who_suspends_for_itself_puts_the_tap_back(device: str, namespace: NetNamespace) -> None:
    with namespace.run(lambda: Tap.open("tap0")) as tap:
        with Session(config(device), tap=tap) as session:
            session.start()
            session.suspend(hand_on=False)
            assert tap.queues[0].vnet_hdr_size() == 12
        assert tap.queues[0].vnet_hdr_size() == 10


def test_a_live_tap_is_not_tried_again(
    device: str, namespace: NetNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TapQueue] = []
    offloads = TapQueue.offloads

    def counted(queue: TapQueue) -> int:
        asked.append(queue)
        return offloads(queue)

    monkeypatch.setattr(TapQueue, "offloads", counted)
    bits = SessionConfig().driver | 1 << virtio.VIRTIO_NET_F_GUEST_CSUM
    with (
        GuestMemory.anonymous(1 << 20) as memory,
        namespace.run(lambda: Tap.open("tap0")) as tap,
        Session(replace(config(device), driver=bits), memory=memory, tap=tap) as session,
    ):
        session.start()
        document = Snapshot.from_json(session.suspend().to_json())
        resumed = Session.resume(document, device, memory=session.memory, tap=tap)
        with resumed:
            resumed.start()
            assert resumed.features == session.features
            assert resumed.features >> virtio.VIRTIO_NET_F_GUEST_CSUM & 1
    assert len(asked) == 1


def test_a_tap_that_was_deleted_is_replaced(device: str, namespace: NetNamespace) -> None:
    with ExitStack() as later:
        taps = [
            later.enter_context(namespace.run(partial(Tap.open, f"tap{number}", 2)))
            for number in range(3)
        ]
        session = later.enter_context(Session(config(device, 2), tap=taps[0]))
        session.start()
        namespace.run(lambda: delete("tap0"))
        session.replace_tap(taps[1])
        assert session.state is State.RUNNING
        assert taps[1].queues[1].vnet_hdr_size() == 12
        with pytest.raises(InvalidArgument, match="cannot take its own place"):
            session.replace_tap(taps[1])
        assert taps[1].queues[1].vnet_hdr_size() == 12
        session.replace_tap(taps[2])
        assert taps[1].queues[1].vnet_hdr_size() == 10
        namespace.run(lambda: delete("tap2"))
        session.close()


def delete(name: str) -> None:
    with pyroute2.IPRoute() as route:
        route.link("del", index=socket.if_nametoindex(name))


def test_what_was_handed_in_can_be_prepared_again(device: str, namespace: NetNamespace) -> None:
    open_tap = partial(namespace.run, partial(Tap.open, "tap0"))
    with VhostNet.at(device) as vhost:
        session = Session(
            config(device), vhost=[vhost], open_tap=open_tap, observe=refusing("VHOST_SET_MEM", 1)
        )
        with pytest.raises(KernelError, match="VHOST_SET_MEM_TABLE"):
            session.prepare()
        assert session.state is State.NEW
        with session:
            session.start()
        with pytest.raises(StateError), session:
            pass


def test_a_ring_outside_memory_leaves_nothing_pinned(device: str, namespace: NetNamespace) -> None:
    open_tap = partial(namespace.run, partial(Tap.open, "tap0"))
    with (
        MappedRegion.anonymous(0, 1 << 20, "low") as low,
        MappedRegion.anonymous(1 << 30, 1 << 20, "high") as high,
    ):
        space = AddressSpace([low, high])
        rings, _ = place_rings(0, 2, 64)
        rings[1] = replace(rings[1], used=1 << 40)
        with pytest.raises(InvalidArgument, match="queue 1 used"):
            Session(config(device), memory=space, rings=rings, open_tap=open_tap).prepare()
        space.remove("low")


@pytest.mark.parametrize("disabled", [False, True])
def test_rings_that_were_stopped_alone_stay_so(wire: Wire, disabled: bool) -> None:
    session = wire.session
    session.stop_ring(RX)
    if disabled:
        session.disable_pair(0)
        session.enable_pair(0)
    else:
        session.set_link(False)
        session.set_link(True)
    assert not session.devices[0].attached(RX)
    assert session.devices[0].attached(TX)
    session.set_link(False)
    session.start_ring(RX, session.devices[0].base(RX))
    assert not session.devices[0].attached(RX)
    session.set_link(True)
    assert session.devices[0].attached(RX)
    prove(wire)


def test_a_pair_that_cannot_be_put_back_fails_the_session(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = wire.session
    with monkeypatch.context() as broken:
        broken.setattr(TapQueue, "disable", raise_error)
        broken.setattr(VhostPair, "attach", raise_error)
        with pytest.raises(OSError, match="injected"):
            session.disable_pair(1)
    assert session.state is State.FAILED


def raise_error(*_: object) -> None:
    raise OSError("injected")


def test_the_send_buffer_is_what_was_asked_for(device: str) -> None:
    with Wire(wire_config(replace(config(device), sndbuf=1 << 20))) as wire:
        assert wire.session.tap is not None
        assert wire.session.tap.queues[0].sndbuf() == 1 << 20
        prove(wire)


def test_a_device_that_cannot_log_says_so(wire: Wire) -> None:
    wire.session._wiring.log_offered = False
    with pytest.raises(InvalidArgument, match="no VHOST_F_LOG_ALL"):
        wire.session.start_log()


def test_an_eventfd_of_no_known_name_is_refused(device: str) -> None:
    with EventFd.create() as event, pytest.raises(InvalidArgument, match="event 'kik'"):
        Session(config(device), events=[{"kik": event}, {}])
