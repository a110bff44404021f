"""A guest that does everything wrong, on a machine of /dev/kvm whose vCPU is played by the test."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self, TypeVar, cast

import pytest

from tests.support.realmode import open_kvm
from tests.support.vmm_chaos import Chaos
from tests.support.vmm_hostile import RAM, Driver, GuestCpu
from tests.support.vmm_net import BITS, MAC, Commands
from tests.support.wired import NOTHING_LOST, Wired
from vhostctl.abi import pci, virtio
from vhostctl.control import access
from vhostctl.control.rings import place_rings
from vhostctl.host.memory import BorrowedRegion, MappedRegion
from vhostctl.host.vhost import VhostNet
from vhostctl.vmm.log import BURST, PERIOD
from vhostctl.vmm.machine import Machine, MachineConfig
from vhostctl.vmm.net import NetDevice
from vhostctl.vmm.netconfig import NetConfig

T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("kvm_is_there", "nothing_left")

GUARD = 4 << 20
PATIENCE = 60  # seconds that one access may take
OPERATIONS = int(os.environ.get("VHOSTCTL_TEST_OPERATIONS", "100000"))
MQ = (virtio.VIRTIO_NET_CTRL_MQ, virtio.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET)


@pytest.fixture(scope="module")
def kvm_is_there() -> None:
    open_kvm().close()


class Guarded:
    """RAM in the middle of a larger mapping, others beside it, all of it with a pattern."""

    def __init__(self, stack: ExitStack) -> None:
        self._parts: list[tuple[memoryview, bytes]] = []
        pattern = random.Random(0).randbytes(GUARD)  # noqa: S311 -- a pattern
        around = stack.enter_context(MappedRegion.anonymous(0, RAM + 2 * GUARD, "around"))
        beside = [
            stack.enter_context(MappedRegion.anonymous(0, GUARD, f"beside {n}")) for n in range(3)
        ]
        stack.callback(self._forget)
        self._add(around.view()[:GUARD], pattern)
        self._add(around.view()[GUARD + RAM :], pattern)
        for region in beside:
            self._add(region.view(), pattern)
        self.ram = BorrowedRegion(0, RAM, around.hva + GUARD, "RAM")

    def _add(self, view: memoryview, pattern: bytes) -> None:
        view[:] = pattern
        self._parts.append((view, pattern))

    @property
    def intact(self) -> bool:
        return all(view == pattern for view, pattern in self._parts)

    def _forget(self) -> None:
        self._parts.clear()


class Pc(Wired):
    """A machine with a card of two queue pairs, in a network namespace that sends to it."""

    def __init__(self, device: str, config: MachineConfig) -> None:
        super().__init__(2)
        enter = self.stack.enter_context
        try:
            self.guarded = Guarded(self.stack)
            vhost = [enter(VhostNet.at(device)) for _ in range(2)]
            ram = cast("Any", self.guarded.ram)
            self.machine = enter(Machine(config, [ram], lambda _: None))
            # The guest may switch the machine off, and that would be all that it remembers.
            self.errors: list[BaseException] = []
            self.machine.loop._on_error = self.errors.append
            self.net = NetDevice(self.machine.space, self.tap, vhost, NetConfig(MAC))
            self.cpu = GuestCpu(self.machine, self.machine.add(self.net))
            self.pci = Driver(self.cpu)
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Do what a well-behaved driver does, whatever there was before."""
        driver = self.pci
        driver.come_home()
        # Each call waits in its eventfd for our driver then, which is a thread of this process.
        driver.msix_control(pci.PCI_MSIX_FLAGS_ENABLE | pci.PCI_MSIX_FLAGS_MASKALL)
        features = self.net.features & BITS
        driver.accept(features)
        assert driver.get("device_status") == 11
        placed, end = place_rings(0, 5, 256)
        placed[4] = place_rings(placed[4].desc, 1, 64)[0][0]
        access.write(self.machine.space, 0, bytes(end))
        for queue, ring in enumerate(placed):
            driver.place(queue, ring)
        driver.set("device_status", 15)
        assert driver.get("device_status") == 15
        self.commands = Commands(self.machine.space, placed[4], end)
        end += 4096
        self.drive(self.machine.space, self.net, placed, features, (end, RAM - end))

    def command(self, *words: int, data: bytes) -> int:
        """Give a command; return what it was answered with."""
        self.commands.add(bytes(words) + data)
        self.pci.ring(4)
        return self.commands.answer(bytes(words) + data)


class Flood:
    """Frames for the guest all the time: broadcasts of every size, from many ports."""

    def __init__(
        self, in_namespace: Callable[[Callable[[], socket.socket]], socket.socket]
    ) -> None:
        self._sockets = [in_namespace(self._open) for _ in range(8)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flood")

    @staticmethod
    def _open() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.setblocking(False)
        return sock

    def _run(self) -> None:
        sizes = random.Random(0)  # noqa: S311 -- sizes of datagrams
        while not self._stop.wait(0.002):
            for sock in self._sockets:
                try:
                    sock.sendto(bytes(sizes.choice((0, 18, 1400, 9000))), ("192.0.2.255", 9))
                except OSError:  # a full queue, no tap yet
                    continue

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for sock in self._sockets:
            sock.close()


@pytest.mark.parametrize(
    ("seed", "share", "config"),
    [
        (1, 0.4, MachineConfig()),
        (2, 0.3, MachineConfig(irqfd=False)),
        (3, 0.3, MachineConfig(ioeventfd=False)),
    ],
    ids=["kvm", "no irqfd", "no ioeventfd"],
)
def test_a_guest_that_does_everything_wrong(
    device: str, seed: int, share: float, config: MachineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with Pc(device, config) as pc:
        chaos = Chaos(pc.pci, pc.net, seed)
        began = time.monotonic()
        with Flood(pc.in_namespace):
            chaos.run(int(OPERATIONS * share))
        periods = (time.monotonic() - began) / PERIOD
        assert pc.errors == []
        assert pc.guarded.intact
        assert pc.cpu.slowest < PATIENCE
        assert len(caplog.records) <= BURST * (2 + periods)
        counters = pc.counters()
        assert min(chaos.starts, counters.rx_packets, counters.tx_packets) > 0, "it was not tried"
        print(f"{chaos.starts} starts, slowest {pc.cpu.slowest:.3f} s, {counters}")
        with pc.cpu.explained("a driver that does everything right"):
            with pc.machine.lock:
                pc.net.set_link(True)
            pc.start()
            assert pc.command(*MQ, data=b"\2\0") == virtio.VIRTIO_NET_OK
            assert pc.exchange(2, 256) == NOTHING_LOST
        assert pc.guarded.intact
        assert pc.errors == []
