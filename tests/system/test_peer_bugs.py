"""What other control planes got wrong, each as a test that would have caught it.

Those about negotiation are in test_negotiation.py, a shared call in test_notifiers.py, LOG_ALL
left on in test_dirty_log.py, an MQ command that does nothing in test_multiqueue.py.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.system.conftest import until
from vhostctl.control.netsetup import LinkSettings
from vhostctl.control.session import Session
from vhostctl.control.snapshot import Snapshot
from vhostctl.control.states import State
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import KernelError
from vhostctl.host.links import Links
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import RX, TX
from vhostctl.jobs.selftest import wire_config
from vhostctl.jobs.wire import Wire

pytestmark = pytest.mark.usefixtures("nothing_left")

FRAMES = 5


@pytest.fixture
def wire(device: str) -> Wire:
    return Wire(wire_config(SessionConfig(device=device, queues=2, queue_size=64)))


def send(wire: Wire, frames: int = FRAMES) -> None:
    pair = wire.driver.pairs[1]
    pair.send([b"\xff" * 6 + bytes(54)] * frames)
    until(lambda: pair.stats().tx_completed >= frames, "frames out")


def test_bug_restore_field_never_filled(wire: Wire, device: str) -> None:
    with wire:
        send(wire)
        told = wire.session.suspend().rings
        asked = [pair.base(ring) for pair in wire.session.devices for ring in (RX, TX)]
        assert [ring.base for ring in told] == asked
        assert told[3].base == FRAMES
        document = Snapshot.from_json(wire.session.snapshot().to_json())
        events = [dict(queue.events) for queue in wire.session.queues]
        resumed = Session.resume(
            document, device, memory=wire.session.memory, tap=wire.session.tap, events=events
        )
        with resumed:
            resumed.start()
            bases = resumed.stop()
        assert bases[1::2] == asked[1::2]
        for now, then in zip(bases[::2], asked[::2], strict=True):
            assert now - then in range(64)  # the host may have sent something


def test_bug_base_read_into_a_constant(wire: Wire) -> None:
    with wire:
        for turn in range(1, 4):
            send(wire, turn * FRAMES)
            bases = wire.session.stop()
            assert bases[3] == wire.driver.pairs[1].stats().tx_completed
            wire.session.start(bases)


def test_bug_panic_on_activation(namespace: NetNamespace, device: str) -> None:
    """What the device refuses when the guest starts is an error, and can be tried again."""
    with namespace.run(lambda: Tap.open("tap0")) as tap, namespace.run(lambda: Tap.open("x")) as x:
        config = SessionConfig("tap0", device)
        with Session(config, tap=tap) as session:
            x.close()
            session._wiring.side.tap = Tap("x", [x.queues[0]], created=False)
            with pytest.raises(ValueError, match="x queue 0 is closed"):
                session.start()
            session._wiring.side.tap = tap
            assert session.state is State.RINGS_SET
            with namespace.run(lambda: Tap.open("y")) as y, pytest.MonkeyPatch.context() as patch:
                patch.setattr(y.queues[0], "fileno", lambda: 0)
                session._wiring.side.tap = y
                with pytest.raises(KernelError, match="VHOST_NET_SET_BACKEND"):
                    session.start()
            session._wiring.side.tap = tap
            session.start()
            assert session.stop() == [0, 0]


def test_bug_tap_never_taken_down(namespace: NetNamespace, device: str) -> None:
    """A tap that was there is as it was afterwards: down, with its MTU and header."""
    with namespace.run(lambda: Tap.open("tap0")) as mine:
        mine.queues[0].set_persist(True)
        before = namespace.run(state)
    assert not json.loads(before)["up"]
    config = wire_config(SessionConfig(device=device))
    config = replace(config, link=LinkSettings(("192.0.2.1/24",), mtu=1400), isolated=False)

    def use() -> None:
        with Wire(config) as wire:
            assert wire.link_state().up
            assert wire.link_state().mtu == 1400

    namespace.run(use)
    assert namespace.run(state) == before


def state() -> str:
    with Links() as links:
        found = links.state("tap0")
    return json.dumps({"up": found.up, "mtu": found.mtu, "master": found.master})
