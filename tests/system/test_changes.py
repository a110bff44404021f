"""What is changed of a running session, one change at a time, and what it leaves."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from tests.system.conftest import Possessions, until
from vhostctl.abi import virtio
from vhostctl.control.netsetup import LinkSettings, link_steps
from vhostctl.control.plan import Plan, Step
from vhostctl.control.rings import RingPlacement, place_rings
from vhostctl.control.session import Session
from vhostctl.control.snapshot import Snapshot
from vhostctl.control.states import State
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import InvalidArgument, KernelError, NegotiationError, StateError
from vhostctl.guest.config import QueueConfig
from vhostctl.guest.driver import NetDriver, QueuePair
from vhostctl.host.links import Links
from vhostctl.host.memory import MappedRegion
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import ENGINE, RX, TX, VhostNet
from vhostctl.host.worker import workers
from vhostctl.jobs.selftest import wire_config
from vhostctl.jobs.traffic import HOST, Traffic
from vhostctl.jobs.wire import Wire

pytestmark = pytest.mark.usefixtures("nothing_left")

FRAMES = 200


def config(device: str, queues: int = 1) -> SessionConfig:
    return SessionConfig("tap0", device, queues=queues, queue_size=64)


@pytest.fixture
def wire(device: str) -> Iterator[Wire]:
    with Wire(wire_config(config(device, 2))) as wire:
        yield wire


def prove(wire: Wire, frames: int = FRAMES) -> None:
    """Every frame goes both ways over every pair; what an earlier proof sent does not count."""
    with Traffic(wire, wire.driver.pairs) as traffic:
        assert traffic.exchange(frames) == frames
        assert (traffic.to_guest.lost, traffic.to_host.lost) == (0, 0)


def other_tap(wire: Wire, name: str = "tap1", queues: int = 2) -> Tap:
    return wire.in_namespace(lambda: Tap.open(name, queues))


def bring_up(wire: Wire, name: str) -> None:
    def up() -> None:
        with Links() as links:
            Plan(link_steps(links, name, LinkSettings())).run()

    wire.in_namespace(up)


def test_the_tap_is_replaced(device: str) -> None:
    with ExitStack() as later, Wire(wire_config(config(device, 2))) as wire:
        session = wire.session
        prove(wire)
        old = session.tap
        assert old is not None
        old.queues[0].set_persist(True)  # what was set up on it is undone at the end
        tap = later.enter_context(other_tap(wire))
        small = later.enter_context(other_tap(wire, "tap2", 1))
        bring_up(wire, "tap1")
        session.replace_tap(tap)
        assert session.tap is tap
        assert old.queues[0].closed, "it was the session's own"
        assert tap.queues[1].vnet_hdr_size() == session.negotiated.header_size
        with pytest.raises(InvalidArgument, match="1 queues for 2 pairs"):
            session.replace_tap(small)
        before = wire.in_namespace(lambda: links_counters("tap1"))
        wire.driver.pairs[1].send([bytes(60)])
        until(lambda: wire.in_namespace(lambda: links_counters("tap1")) > before, "a frame")


def links_counters(name: str) -> int:
    with Links() as links:
        return links.counters(name).rx_packets


def refusing(name: str, nth: int) -> Callable[[Step], None]:
    """Return an observer that fails before the nth step of that name."""
    seen: list[Step] = []

    def observe(step: Step) -> None:
        if step.name.startswith(name):
            seen.append(step)
            if len(seen) == nth:
                raise KernelError(5, step.name, step.target)

    return observe


@pytest.mark.parametrize("nth", range(1, 6))
def test_a_tap_that_cannot_take_over_leaves_the_old_one(wire: Wire, nth: int) -> None:
    with other_tap(wire) as tap:
        wire.session._observe = refusing("", nth)
        with pytest.raises(KernelError):
            wire.session.replace_tap(tap)
        wire.session._observe = None
        assert wire.session.tap is not tap
        assert tap.queues[0].vnet_hdr_size() == 10
    assert wire.session.state is State.RUNNING
    prove(wire)


@pytest.mark.parametrize("up", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("nth", range(1, 5))
def test_a_link_change_that_fails_is_taken_back(wire: Wire, up: bool, nth: int) -> None:
    if up:
        wire.session.set_link(False)
    wire.session._observe = refusing("VHOST_NET_SET_BACKEND", nth)
    with pytest.raises(KernelError):
        wire.session.set_link(up)
    wire.session._observe = None
    assert wire.session.link is not up
    wire.session.set_link(True)
    prove(wire)


def test_frames_wait_while_the_link_is_down(wire: Wire) -> None:
    session = wire.session
    session.set_link(False)
    session.set_link(False)
    sent = wire.counters().rx_packets
    wire.driver.pairs[0].send([bytes(60)] * 5)
    base = session.devices[0].base(TX)
    assert wire.counters().rx_packets == sent
    waiting = session.ring_status()[TX]
    assert (waiting.running, waiting.base, waiting.avail_index) == (False, base, base + 5)
    with pytest.raises(StateError, match="the link is down"):
        session.disable_pair(1)
    session.set_link(True)
    until(lambda: wire.counters().rx_packets >= sent + 5, "the frames that waited")
    assert session.devices[0].base(TX) == base + 5


def test_each_ring_says_where_it_stands(wire: Wire) -> None:
    session = wire.session

    def all_used() -> bool:
        return all(ring.used_index == ring.avail_index for ring in session.ring_status()[TX::2])

    prove(wire)
    until(all_used, "every sent buffer comes back")
    session.mask(3)
    session.stop_ring(0)
    found = session.ring_status()
    assert [ring.queue for ring in found] == [0, 1, 2, 3]
    assert [ring.running for ring in found] == [False, True, True, True]
    assert [ring.masked for ring in found] == [False, False, False, True]
    for ring, queue in zip(found, session.queues, strict=True):
        place = queue.placement
        assert (ring.size, ring.desc, ring.avail, ring.used) == (
            place.size,
            place.desc,
            place.avail,
            place.used,
        )
        assert 0 < ring.used_index <= ring.base <= ring.avail_index <= ring.used_index + ring.size
    for receive, transmit in zip(found[RX::2], found[TX::2], strict=True):
        assert receive.base < receive.avail_index
        assert transmit.base == transmit.avail_index
    assert session.devices[1].base(TX) == found[3].base


def test_a_ring_is_reset_to_another_place(device: str) -> None:
    """What VIRTIO_F_RING_RESET asks for: one ring stops, and starts anew at another place."""
    with Wire(wire_config(config(device))) as wire, ExitStack() as stack:
        session = wire.session
        prove(wire)
        other = wire.session.queues
        start, size = session.arena
        wire.driver.close()
        for queue in range(2):
            session.stop_ring(queue)
        rings, end = place_rings(start, 2, 128)
        with pytest.raises(InvalidArgument, match="outside"):
            session.start_ring(RX, 0, place_rings(1 << 40, 1, 64)[0][0])
        places = [
            replace(QueueConfig(128, 0, 0, 0, kick=queue.kick, call=queue.call), **vars_of(ring))
            for queue, ring in zip(session.queues, rings, strict=True)
        ]
        # The driver writes its rings before the device looks at them.
        driver = stack.enter_context(
            NetDriver(
                session, [(places[0], places[1])], session.features, (end, start + size - end)
            )
        )
        for queue in range(2):
            session.start_ring(queue, 0, rings[queue])
            with pytest.raises(InvalidArgument, match="is running"):
                session.start_ring(queue)
        wire.driver = driver
        for pair in driver.pairs:
            pair.start()
        assert other[0].size == 128
        prove(wire)


def vars_of(ring: RingPlacement) -> dict[str, int]:
    return {"desc": ring.desc, "avail": ring.avail, "used": ring.used}


def test_the_mtu_changes_while_it_runs(device: str) -> None:
    plain = wire_config(config(device))
    with Wire(replace(plain, link=replace(plain.link, mtu=9000))) as wire:
        (pair,) = wire.driver.pairs

        wire.in_namespace(lambda: multicast(8000))
        until(lambda: 8042 in lengths(pair), "a long frame")
        wire.set_mtu(1500)
        prove(wire)
        wire.in_namespace(lambda: multicast(8000))
        until(lambda: 1514 in lengths(pair), "its fragments")
        with pytest.raises(InvalidArgument, match="the guest's buffers are for 9000"):
            wire.set_mtu(9001)
        wire.set_mtu(9000)
        wire.in_namespace(lambda: multicast(8000))
        until(lambda: 8042 in lengths(pair), "a long frame again")


def multicast(size: int) -> None:
    """Send a datagram that needs nobody's address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(HOST[4]))
        sock.sendto(bytes(size), ("224.0.0.1", 9))


def lengths(pair: QueuePair) -> set[int]:
    return {len(frame) for frame in pair.receive(64)}


@pytest.mark.parametrize("kind", ["task", "kthread"])
def test_the_worker_is_what_was_asked_for(device: str, kind: str, namespace: NetNamespace) -> None:
    before = workers()
    with VhostNet.at(device) as probe:
        try:
            probe.get_fork_from_owner()
        except KernelError:
            session = Session(
                replace(config(device), worker=kind),
                open_tap=lambda: namespace.run(lambda: Tap.open("tap0")),
            )
            with pytest.raises(KernelError, match="VHOST_SET_FORK_FROM_OWNER"), session:
                pass
            return
    with Wire(wire_config(replace(config(device), worker=kind))) as wire:
        (found,) = workers() - before
        assert found.kind == kind
        prove(wire)


def test_busyloop_is_what_was_asked_for(device: str) -> None:
    with Wire(wire_config(replace(config(device), busyloop=1024))) as wire:
        vhost = wire.session.devices[0].vhost
        assert vhost.get_vring_busyloop_timeout(RX) == 1000
        wire.session.set_busyloop(0)
        assert vhost.get_vring_busyloop_timeout(TX) == 0
        assert wire.session.snapshot().busyloop == 0
        prove(wire)


def test_every_address_is_translated(device: str) -> None:
    with Wire(wire_config(replace(config(device, 2), translating=True))) as wire:
        assert wire.session.features >> virtio.VIRTIO_F_ACCESS_PLATFORM & 1
        prove(wire)
        iotlb = wire.session.iotlb
        assert iotlb is not None
        start, size = wire.session.arena
        assert iotlb.unmap(start, size)
        iotlb.map(start, size, start)
        prove(wire)
        assert iotlb.counters().answered > 0
        assert iotlb.missing() == []
        session = wire.session
        for queue in range(4):
            session.start_ring(queue, session.stop_ring(queue))
        session.set_link(False)
        session.set_link(True)
        session.disable_pair(0)
        session.enable_pair(0)
        session.start_log()
        prove(wire)
        session.stop_log()
        with MappedRegion.anonymous(1 << 40, 4096, "dimm0") as region:
            session.memory.add(region)
            assert iotlb.mappings.translate(1 << 40)
            session.memory.remove(region)
            assert not iotlb.mappings.translate(1 << 40)
        prove(wire)


def test_a_suspend_that_is_interrupted_goes_on(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    settle, asked = VhostNet.settle, []

    def interrupted(device: VhostNet, *args: Any) -> int:
        asked.append(device)
        left = settle(device, *args)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return left

    monkeypatch.setattr(VhostNet, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wire.session.suspend()
    assert wire.session.state is State.RUNNING
    prove(wire)


def test_a_session_resumes_from_its_document(wire: Wire, device: str) -> None:
    """Also with a pair disabled, a call masked, a ring stopped and the link down."""
    session = wire.session
    tap = session.tap
    assert tap is not None
    prove(wire)
    session.disable_pair(0)
    session.mask(3)
    frame = b"\xff" * 6 + bytes(54)
    assert wire.driver.pairs[1].send([frame] * 64) == 64
    until(lambda: wire.driver.pairs[1].stats().tx_in_flight == 0, "frames")
    session.set_busyloop(50)
    text = session.suspend().to_json()
    document = Snapshot.from_json(text)
    assert document.order == (1,)
    assert json.loads(text)["rings"][3]["masked"]
    assert document.rings[2].base > 0
    events = [dict(queue.events) for queue in session.queues]
    resumed = Session.resume(
        document, device, memory=session.memory, tap=session.tap, events=events
    )
    with resumed:
        resumed.start()
        assert list(resumed.enabled) == [False, True]
        assert resumed.devices[1].calls[TX].masked
        assert resumed.devices[1].calls[TX].pending is document.rings[3].pending
        resumed.unmask(3)
        resumed.enable_pair(0)
        resumed.kick()
        prove(wire)
        resumed.disable_pair(1)
        resumed.mask(2)
        resumed.stop_ring(0)
        resumed.set_link(False)
        session.catch_up(Snapshot.from_json(resumed.suspend().to_json()))
    assert tap.queues[0].vnet_hdr_size() == session.negotiated.header_size
    session.start()
    assert (list(session.enabled), session.link) == ([True, False], False)
    assert session.devices[1].calls[RX].masked
    session.set_link(True)
    assert not session.devices[0].attached(RX)
    session.start_ring(0, session.devices[0].base(RX))
    session.enable_pair(1)
    session.unmask(2)
    session.kick()
    prove(wire)


def test_a_device_that_lacks_a_feature_is_refused(wire: Wire, device: str) -> None:
    document = wire.session.snapshot()
    names = (*document.features, "VIRTIO_F_RING_PACKED")
    changed = Snapshot.from_json(
        json.dumps(json.loads(document.to_json()) | {"features": sorted(names)})
    )
    before = Possessions.now()
    resumed = Session.resume(changed, device, memory=wire.session.memory, tap=wire.session.tap)
    with pytest.raises(NegotiationError, match="VIRTIO_F_RING_PACKED"), resumed:
        pass
    until(lambda: Possessions.now() == before, "as before")
    prove(wire)


def test_memory_that_is_missing_is_named(wire: Wire) -> None:
    document = json.loads(wire.session.snapshot().to_json())
    document["memory"].append({"gpa": 1 << 45, "size": 4096, "name": "dimm7"})
    changed = Snapshot.from_json(json.dumps(document))
    with pytest.raises(InvalidArgument, match="dimm7"):
        Session.resume(changed, ENGINE, memory=wire.session.memory)
