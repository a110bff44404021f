"""A pair in translating mode: every address that device and driver see is an I/O virtual one.

The driver's memory is one piece for this process, two regions in the wrong order for the
guest, and lies at IOVA for the device; none of the three addresses can pass for another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from socket import socket
from typing import TypeVar

from vhostctl.abi import vhost, virtio
from vhostctl.control.features import mask
from vhostctl.control.iotlb import Iotlb
from vhostctl.control.iovamap import IovaMap
from vhostctl.control.memtable import GuestRegion, MemoryTable
from vhostctl.control.netsetup import LinkSettings, link_steps
from vhostctl.control.plan import Plan
from vhostctl.control.rings import RingPlacement, place_rings
from vhostctl.errors import CheckFailed
from vhostctl.guest.config import QueueConfig
from vhostctl.guest.driver import NetDriver
from vhostctl.guest.endpoint import Endpoint, EndpointCounters, Peer
from vhostctl.guest.streams import Stream
from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd
from vhostctl.host.links import Links
from vhostctl.host.memory import GuestMemory
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import UNLIMITED, Tap
from vhostctl.host.vhost import RX, TX, VhostNet
from vhostctl.jobs.hosttraffic import PATIENCE, WINDOW, HostSockets, StreamReceiver, Tally
from vhostctl.jobs.running import Running

T = TypeVar("T")

PAGE = 4096
IOVA = 0x6D_1234_5000
GPAS = (0x2_0000_0000, 0x1_0000_0000)
"""Of the first half of the driver's memory, and of the second."""

HOST = {4: "192.0.2.1", 6: "2001:db8::1"}
GUEST = {4: "192.0.2.2", 6: "2001:db8::2"}
GUEST_MAC = bytes.fromhex("020000000002")

_TAP = "tap0"
_MTU = 1500
_TO_GUEST, _TO_HOST, _FROM_GUEST = 7000, 7100, 7200  # UDP ports
FEATURES = mask(
    virtio.VIRTIO_NET_F_MRG_RXBUF,
    virtio.VIRTIO_RING_F_INDIRECT_DESC,
    virtio.VIRTIO_RING_F_EVENT_IDX,
    virtio.VIRTIO_F_VERSION_1,
    virtio.VIRTIO_F_ACCESS_PLATFORM,
)


class Translated(Closing):
    """Brought up and running when it is made; `iotlb` answers in a thread if `serve`.

    `mapped` is the bytes of each mapping, 0 for as few as there can be.
    """

    def __init__(
        self,
        device: str,
        *,
        size: int = 256,
        buffer_size: int = 2048,
        mapped: int = 0,
        serve: bool = True,
    ) -> None:
        rings, end = place_rings(IOVA, 2, size)
        sizes = [size, size]
        arena = NetDriver.arena_size(sizes, FEATURES, buffer_size, _MTU + 14)
        self.half = (end - IOVA + arena + 2 * PAGE - 1) // (2 * PAGE) * PAGE
        self.rings: list[RingPlacement] = rings
        self._arenas = [end, end + NetDriver.arena_size([size], FEATURES, buffer_size, _MTU + 14)]
        self._arenas.append(end + arena)
        self._stack = ExitStack()
        try:
            self.namespace = self._enter(NetNamespace())
            self.memory = self._enter(GuestMemory.anonymous(2 * self.half))
            self.events = [[self._enter(EventFd.create()) for _ in range(3)] for _ in rings]
            self.tap = self._open_tap()
            self.device = self._enter(VhostNet.at(device))
            self.iotlb = self._enter(Iotlb([self.device], IovaMap(), self.table()))
            self.map_all(mapped)
            self._set_up()
            queues = [
                QueueConfig(size, r.desc, r.avail, r.used, kick.fileno(), call.fileno())
                for r, (kick, call, _) in zip(rings, self.events, strict=True)
            ]
            driver = NetDriver(
                self, [(queues[RX], queues[TX])], FEATURES, (end, arena), buffer_size=buffer_size
            )
            self.driver = self._enter(driver)
            if serve:
                self._enter(Running(self.iotlb, "vhostctl-iotlb"))
            for ring in (RX, TX):
                self.attach(ring)
                self._stack.callback(self.device.set_backend, ring, None)
            self.driver.pairs[0].start()
        except BaseException:
            self.close()
            raise

    def _enter(self, held: AbstractContextManager[T]) -> T:
        return self._stack.enter_context(held)

    def table(self) -> MemoryTable:
        hva = self.memory.regions[0].hva
        return MemoryTable(
            GuestRegion(gpa, self.half, hva + n * self.half) for n, gpa in enumerate(GPAS)
        )

    def mappings(self, size: int = 0) -> Iterator[tuple[int, int, int]]:
        """Yield (iova, size, gpa) of mappings of `size` bytes each for all of the memory."""
        size = size or self.half
        for n, gpa in enumerate(GPAS):
            for at in range(0, self.half, size):
                yield IOVA + n * self.half + at, min(size, self.half - at), gpa + at

    def map_all(self, size: int = 0) -> None:
        for mapping in self.mappings(size):
            self.iotlb.map(*mapping)

    def map(self, iova: int, size: int = PAGE) -> None:
        """Map again what was withdrawn; bytes."""
        for start, length, gpa in self.mappings():
            first, end = max(iova, start), min(iova + size, start + length)
            if first < end:
                self.iotlb.map(first, end - first, gpa + first - start)

    def pages(self) -> range:
        return range(IOVA, IOVA + 2 * self.half, PAGE)

    def buffers(self, ring: int) -> tuple[int, int]:
        """Return (iova, bytes) of the pages that have nothing but buffers of `ring`."""
        start, end = (self._arenas[ring] + PAGE - 1) & -PAGE, self._arenas[ring + 1] & -PAGE
        return start, end - start

    def hva(self, iova: int, length: int) -> int:
        """As the driver asks, who knows I/O virtual addresses only."""
        assert iova >= IOVA
        assert iova + length <= IOVA + 2 * self.half
        return self.memory.regions[0].hva + iova - IOVA

    def _open_tap(self) -> Tap:
        tap = self._enter(self.namespace.run(lambda: Tap.open(_TAP)))
        tap.queues[0].set_vnet_hdr_size(12)
        tap.queues[0].set_offload(0)
        tap.queues[0].set_sndbuf(UNLIMITED)
        self.links = Links()
        self._stack.callback(self.namespace.run, self.links.close)
        self.namespace.run(self.links.open)
        settings = LinkSettings((f"{HOST[4]}/24", f"{HOST[6]}/64"), mtu=_MTU)
        self.namespace.run(Plan(link_steps(self.links, _TAP, settings)).run)
        return tap

    def _set_up(self) -> None:
        device = self.device
        device.set_owner()
        # Before the addresses: newer kernels forget those when translation is switched on.
        device.set_features(FEATURES)
        v2 = 1 << vhost.VHOST_BACKEND_F_IOTLB_MSG_V2
        device.set_backend_features(device.get_backend_features() & v2)
        device.set_mem_table(self.table().regions)
        for index, ring in enumerate(self.rings):
            kick, call, error = self.events[index]
            device.set_vring_num(index, ring.size)
            device.set_vring_base(index, 0)
            device.set_vring_addr(index, desc=ring.desc, avail=ring.avail, used=ring.used)
            device.set_vring_kick(index, kick.fileno())
            device.set_vring_call(index, call.fileno())
            device.set_vring_err(index, error.fileno())

    def attach(self, ring: int) -> None:
        """Start `ring`, whose used ring the device must know by then."""
        used, length = self.rings[ring].parts()["used"]
        self.iotlb.prime(self.device, used, length)
        self.device.set_backend(ring, self.tap.queues[0].fileno())

    def ring_errors(self) -> int:
        return sum(error.drain() for _, _, error in self.events)

    def close(self) -> None:
        self._stack.close()


class Traffic(Closing):
    """Numbered, checked UDP both ways over a Translated, as the selftest has it.

    `run()` goes on until stopped; `windows` counts what was exchanged, `WINDOW` each.
    """

    def __init__(self, rig: Translated) -> None:
        self._stack = ExitStack()
        self._stop = threading.Event()
        self._stream = Stream.for_mtu(_MTU)
        self.windows = 0
        self.to_host = Tally()
        try:
            self._endpoint = self._stack.enter_context(
                Endpoint(rig.driver.pairs[0], GUEST_MAC, GUEST[4], GUEST[6])
            )
            sockets = HostSockets(rig.namespace.run)
            with Running(self._endpoint, "vhostctl-guest"):
                if sum(sockets.ping(version, GUEST[version], [56]) for version in GUEST) != 2:
                    raise CheckFailed("no answer to a ping")
            self._senders = self._each(partial(sockets.sender, port=_TO_GUEST), GUEST)
            into = self._each(partial(sockets.receiver, port=_TO_HOST), HOST)
            self._receiver = StreamReceiver(self._stream, into, self.to_host)
            mac = rig.namespace.run(lambda: rig.links.state(_TAP)).mac
            self._endpoint.expect(self._stream, _TO_GUEST)
            peer = Peer(bytes.fromhex(mac.replace(":", "")), _TO_HOST, HOST[4], HOST[6])
            self._endpoint.generate(self._stream, peer, _FROM_GUEST)
            self._stack.enter_context(Running(self._endpoint, "vhostctl-guest"))
        except BaseException:
            self.close()
            raise

    def _each(self, make: partial[socket], addresses: dict[int, str]) -> dict[int, socket]:
        return {
            version: self._stack.enter_context(make(version, address))
            for version, address in addresses.items()
        }

    def run(self) -> None:
        while not self._stop.is_set():
            self.exchange()
        self._stop.clear()

    def stop(self) -> None:
        self._stop.set()

    def exchange(self) -> None:
        """Send a window both ways and wait for all of it; CheckFailed if it does not come."""
        start = self.windows * WINDOW
        end = start + WINDOW
        self._endpoint.goal = end
        for k in range(start, end):
            self._senders[self._stream.version(k)].send(self._stream.payload(k))
        if not self._receiver.receive(end):
            raise CheckFailed(f"out of the guest: {self.to_host.frames} of {end} datagrams")
        if not self._endpoint.wait_received(end, PATIENCE):
            raise CheckFailed(f"into the guest: {self.counters.received} of {end} datagrams")
        self.windows += 1

    @property
    def counters(self) -> EndpointCounters:
        return self._endpoint.counters()

    def problems(self) -> list[int]:
        """Return what was lost, changed or repeated, either way; all 0 if all is well."""
        seen, total = self.counters, self.windows * WINDOW
        return [
            total - seen.received,
            seen.changed,
            seen.lost,
            seen.repeated,
            seen.bad_checksum,
            total - self.to_host.frames,
            self.to_host.changed,
        ]

    def close(self) -> None:
        self._stack.close()
