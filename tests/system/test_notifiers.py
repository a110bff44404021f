"""Masks, calls and the error eventfd on a real device, in its own time."""

from __future__ import annotations

import ctypes
import select
from collections.abc import Iterator
from functools import partial

import pytest

from tests.support.flow import Flow
from tests.system.conftest import until
from vhostctl.abi import virtio
from vhostctl.control.features import Policy
from vhostctl.control.notifiers import CallNotifier
from vhostctl.control.session import Session
from vhostctl.control.wiring import SessionConfig
from vhostctl.guest.driver import QueuePair
from vhostctl.host.eventfd import EventFd
from vhostctl.host.vhost import RX, TX, VhostNet
from vhostctl.jobs.selftest import wire_config
from vhostctl.jobs.wire import Wire

pytestmark = pytest.mark.usefixtures("nothing_left")

ROUNDS = 500
FRAME = bytes.fromhex("ffffffffffff020000000002 88b5") + bytes(46)
EVENT_IDX = (virtio.VIRTIO_RING_F_EVENT_IDX, False)


@pytest.fixture(params=[True, False], ids=["event-idx", "flags"])
def wire(device: str, request: pytest.FixtureRequest) -> Iterator[Wire]:
    policy = Policy.of([(virtio.VIRTIO_RING_F_EVENT_IDX, request.param)])
    with Wire(wire_config(SessionConfig(device=device, policy=policy))) as wire:
        yield wire


@pytest.fixture
def eager(device: str) -> Iterator[Wire]:
    """A wire whose device signals for every transmitted frame that it completes."""
    policy = Policy.of([EVENT_IDX])
    with Wire(wire_config(SessionConfig(device=device, policy=policy))) as wire:
        avail = wire.session.devices[0].queues[TX].avail
        ctypes.c_uint16.from_address(wire.session.hva(avail, 2)).value = 0
        yield wire


def completed(pair: QueuePair, frames: int) -> bool:
    return pair.stats().tx_completed == frames


def send(wire: Wire, frames: int = 1) -> None:
    """Send frames one by one, each given back by the device; it is idle in the end."""
    pair = wire.driver.pairs[0]
    for _ in range(frames):
        goal = pair.stats().tx_completed + 1
        assert pair.send([FRAME]) == 1
        until(partial(completed, pair, goal), "the frame is sent")
    # Waits for the worker, which signals behind the used index.
    wire.session.devices[0].vhost.set_log_base(0)


def test_masks_under_traffic_lose_nothing(wire: Wire) -> None:
    calls = wire.session.devices[0].calls
    with Flow(wire) as flow:
        pending = 0
        for number in range(ROUNDS):
            for call in calls:
                call.mask()
            if number % 10 == 0:  # the guest sleeps over it, unless events come through
                until(lambda: calls[RX].pending, "an event while masked")
            pending += calls[RX].pending
            for call in calls:
                call.unmask()
                assert not call.masked
                assert not call.pending
        assert pending >= ROUNDS // 10
        flow.go_on(5)
        assert flow.end() == []


@pytest.mark.parametrize("frames", [0, 1, 7])
def test_what_came_while_masked_is_one_event(eager: Wire, frames: int) -> None:
    device = eager.session.devices[0]
    event, call = device.queues[TX].events["call"], device.calls[TX]
    send(eager)
    assert event.drain() == 1  # each frame signals
    call.mask()
    send(eager, frames)
    assert call.pending is (frames > 0)
    assert event.drain() == 0
    call.unmask()
    assert event.drain() == (frames > 0)
    send(eager)
    assert event.drain() == 1


def test_a_mask_outlives_a_stop(eager: Wire) -> None:
    session = eager.session
    device = session.devices[0]
    event, call = device.queues[TX].events["call"], device.calls[TX]
    call.mask()
    send(eager)
    assert call.pending
    bases = session.stop()
    session.start(bases)
    assert call.masked
    send(eager)
    assert event.drain() == 0
    session.stop()
    call.unmask()
    assert event.drain() == 1


def test_a_mask_before_the_start_holds(device: str) -> None:
    with VhostNet.at(device) as vhost, EventFd.create() as event:
        vhost.set_owner()
        with CallNotifier(vhost, RX, event, "queue 0") as call:
            call.mask()
            call.bind()
            call.unmask()
            assert not call.pending
            assert event.drain() == 0


def eventfds(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Return which device's which ring was bound to which eventfd, at start and while masked."""
    bound: list[tuple[str, int, int]] = []
    honest = VhostNet.set_vring_call

    def note(device: VhostNet, queue: int, eventfd: int | None) -> None:
        if eventfd is not None:
            bound.append((device.label, queue, eventfd))
        honest(device, queue, eventfd)

    monkeypatch.setattr(VhostNet, "set_vring_call", note)
    session.start(session.stop())
    for pair in session.devices:
        for call in pair.calls:
            call.mask()
    return bound


def test_no_two_rings_share_a_call(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One VMM bound one call eventfd to every pair: interrupts of all of them woke the first."""
    with Wire(wire_config(SessionConfig(device=device, queues=2))) as wire:
        bound = eventfds(wire.session, monkeypatch)
        rings = {(label, queue) for label, queue, _ in bound}
        assert len(rings) == 4
        assert len({eventfd for _, _, eventfd in bound}) == 8  # the guest's, and ours
        for pair in wire.session.devices:
            for call in pair.calls:
                call.unmask()


def test_a_malformed_ring_is_an_event(eager: Wire) -> None:
    queue = eager.session.devices[0].queues[TX]
    poll = select.poll()
    poll.register(queue.error.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    index = ctypes.c_uint16.from_address(eager.session.hva(queue.avail, 4) + 2)
    good = index.value
    index.value = good + queue.size + 1
    queue.events["kick"].signal()  # by hand, as no driver would
    assert poll.poll(60_000)
    index.value = good
    assert eager.session.ring_errors()[TX] > 0
