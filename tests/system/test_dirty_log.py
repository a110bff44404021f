"""The dirty log on a real device: what is in it, and that it suffices for a copy."""

from __future__ import annotations

import ctypes
import mmap
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.support.flow import Flow
from tests.support.load import Load
from tests.support.precopy import PAGE, Layout, Precopy, completed, region
from tests.system.conftest import until
from vhostctl.abi.vhost import VHOST_F_LOG_ALL
from vhostctl.control.dirtylog import DirtyLog, DirtyPages
from vhostctl.control.netsetup import LinkSettings, link_steps
from vhostctl.control.plan import Plan
from vhostctl.control.session import Session
from vhostctl.control.wiring import SessionConfig
from vhostctl.guest.driver import NetDriver
from vhostctl.host.eventfd import EventFd
from vhostctl.host.links import Links
from vhostctl.host.memory import GuestMemory
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import VhostNet
from vhostctl.jobs.selftest import wire_config
from vhostctl.jobs.wire import ETHERNET_HEADER, Wire

pytestmark = pytest.mark.usefixtures("nothing_left")

SIZE = 1024  # the used ring has pages of its own, and more than one
GPA = 0x1_0000_0000
FRAME = bytes.fromhex("ffffffffffff020000000002 88b5") + bytes(600)


def config(device: str, queues: int = 1) -> SessionConfig:
    return SessionConfig(device=device, queues=queues, queue_size=SIZE)


@pytest.fixture
def wire(device: str) -> Iterator[Wire]:
    with Wire(wire_config(config(device))) as wire:
        yield wire


def layout_of(wire: Wire) -> Layout:
    return Layout.of(wire.session, wire.config.buffer_size, wire.config.mtu + ETHERNET_HEADER)


def test_used_rings_and_received_frames_are_logged_and_nothing_else(wire: Wire) -> None:
    layout = layout_of(wire)
    with (
        Flow(wire) as flow,
        EventFd.create("log") as event,
        DirtyLog(wire.session.devices, wire.session.memory.table, event) as log,
    ):
        log.start()
        flow.go_on(40)
        pages = log.stop()
        assert event.drain() > 0
        assert flow.end() == []
    for used in layout.used:
        assert pages.within(used).count == used.size // PAGE
    assert pages.within(layout.receive).count > SIZE // 16
    for part in layout.driver:
        assert not pages.within(part), f"{part.gpa:#x}"


def test_translated_writes_are_logged_by_guest_address(device: str) -> None:
    config = wire_config(SessionConfig(device=device, queue_size=SIZE, translating=True))
    with Wire(config) as wire:
        layout = layout_of(wire)
        wire.session.start_log()
        with Flow(wire) as flow:
            flow.go_on(2)
            assert flow.end() == []
        wire.session.stop()
        pages = wire.session.stop_log()
    assert pages.within(layout.receive)
    assert all(pages.within(used) for used in layout.used)
    assert not any(pages.within(part) for part in layout.driver)


def send_one(wire: Wire, pair: int = 0) -> None:
    """Send a frame and wait until the device has given it back."""
    stats = wire.driver.pairs[pair].stats
    goal = stats().tx_completed + 1
    assert wire.driver.pairs[pair].send([FRAME]) == 1
    until(lambda: stats().tx_completed == goal, "the frame is sent")


def test_each_sync_has_what_came_since_the_last(wire: Wire) -> None:
    device = wire.session.devices[0]
    used = region(*device.queues[1].placement.parts()["used"])
    with DirtyLog([device], wire.session.memory.table) as log:
        log.start()
        for _ in range(4):
            # Going idle, the device writes to the ring once more.
            until(lambda: not log.sync().within(used), "the ring is left alone")
            send_one(wire)
            assert used.gpa in [gpa for gpa, _ in log.sync()]


def test_devices_share_one_log(device: str) -> None:
    with Wire(wire_config(config(device, queues=2))) as wire:
        devices = wire.session.devices
        with DirtyLog(devices, wire.session.memory.table) as log:
            log.start()
            for pair in range(2):
                send_one(wire, pair)
            pages = log.stop()
        for vhost in devices:
            assert pages.within(region(*vhost.queues[1].placement.parts()["used"]))


def test_nothing_is_logged_after_stop(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    honest = VhostNet.set_features

    def note(device: VhostNet, features: int) -> None:
        told.append(features)
        honest(device, features)

    monkeypatch.setattr(VhostNet, "set_features", note)
    device = wire.session.devices[0]
    table = wire.session.memory.table
    with Flow(wire) as flow, DirtyLog([device], table) as log:
        log.start()
        flow.go_on()
        assert told[-1] >> VHOST_F_LOG_ALL & 1
        log.stop()
        assert not told[-1] >> VHOST_F_LOG_ALL & 1
        with mmap.mmap(-1, table.end // (8 * PAGE) + 1) as trap:
            place = ctypes.c_char.from_buffer(trap)
            device.vhost.set_log_base(ctypes.addressof(place))
            del place
            flow.go_on(20)
            device.vhost.set_log_base(0)
            assert not any(trap[:])
        assert flow.end() == []


def inject(frame: bytes) -> None:
    """Send a frame to the tap as the host's network stack does."""
    with closing(Links()) as links:
        links.open()
        Plan(link_steps(links, "tap0", LinkSettings())).run()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("tap0", 0))
        sock.send(frame)


def test_memory_that_is_added_while_the_log_runs(device: str, namespace: NetNamespace) -> None:
    far = GPA + (1 << 36)  # behind what the log has room for when it starts
    with (
        GuestMemory([(GPA, 4 << 20)]) as memory,
        GuestMemory([(far, 4 << 20)]) as added,
        Session(
            SessionConfig(device=device),
            memory=memory,
            open_tap=lambda: namespace.run(lambda: Tap.open("tap0")),
        ) as session,
    ):
        session.set_rings()
        session.start_log()
        (buffers,) = added.regions
        session.memory.add(buffers, "added")
        with NetDriver(session, session.pairs, session.features, (far, buffers.size)) as driver:
            session.start()
            driver.pairs[0].start()
            namespace.run(lambda: inject(FRAME))
            assert driver.pairs[0].wait(60)
            session.memory.remove("added")
            assert session.sync_log().within(buffers)
            session.stop()
            assert not session.stop_log().within(buffers)


class NoLog:
    """What a migration without a log would know."""

    def sync(self) -> DirtyPages:
        return DirtyPages()

    stop = sync


@pytest.mark.parametrize("logged", [True, False], ids=["log", "no-log"])
def test_a_copy_under_traffic_is_completed_from_the_log(
    namespace: NetNamespace, device: str, logged: bool
) -> None:
    with Load(namespace, device, queues=1, queue_size=SIZE) as load:
        table = load.session.memory.table
        with DirtyLog(load.session.devices, table) as log:
            log.start()
            copy = Precopy(table, log if logged else NoLog())
            copied = []
            for turn in range(12):
                if turn % 2:  # one round at a guess, the next on its heels
                    load.flow()
                copied.append(copy.round())
            pages, wrong = completed(load, copy)
        load.flow()
        assert load.problems(load.balance()) == []
    copied.append(pages)
    if logged:
        assert wrong == []
        assert sum(copied) > SIZE // 16
        assert max(copied) < table.regions[0].size // PAGE
    else:
        assert len(wrong) > SIZE // 16
