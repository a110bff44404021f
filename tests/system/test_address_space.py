"""Memory of every kind under rings that run, and memory that comes and goes while they do."""

from __future__ import annotations

import ctypes
import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest

from tests.system.conftest import until
from vhostctl.abi import virtio
from vhostctl.control.addressspace import AddressSpace, VhostMemory
from vhostctl.control.netsetup import LinkSettings, link_steps
from vhostctl.control.plan import Plan
from vhostctl.control.rings import RingPlacement, place_rings
from vhostctl.errors import ClosedError, InvalidArgument, KernelError
from vhostctl.guest.driver import NetDriver, QueueConfig
from vhostctl.guest.endpoint import Endpoint, Peer
from vhostctl.guest.streams import Stream
from vhostctl.host import module
from vhostctl.host.eventfd import EventFd
from vhostctl.host.links import Links
from vhostctl.host.memory import PAGE, BorrowedRegion, MappedRegion
from vhostctl.host.netns import NetNamespace
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import Region, VhostNet
from vhostctl.jobs.hosttraffic import PATIENCE, WINDOW, HostSockets, StreamReceiver, Tally
from vhostctl.jobs.running import Running

# Huge pages are the whole machine's: one process at a time reserves them.
pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.xdist_group("huge pages")]

GPA = 0x1_0000_0000
SIZE = 4 << 20
SLOT = 64 << 20  # bytes of guest address between two regions
HOST, GUEST, MAC = "192.0.2.1", "192.0.2.2", bytes.fromhex("020000000002")
TO_HOST, TO_GUEST = 7100, 7200  # UDP ports, plus the pair's number
RING_SIZE = 256
FEATURES = (
    1 << virtio.VIRTIO_F_VERSION_1
    | 1 << virtio.VIRTIO_NET_F_MRG_RXBUF
    | 1 << virtio.VIRTIO_RING_F_EVENT_IDX
)
HUGE = 2 << 20
HUGE_POOL = Path(f"/sys/kernel/mm/hugepages/hugepages-{HUGE >> 10}kB/nr_hugepages")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """As many free huge pages as a region of SIZE takes."""
    if not HUGE_POOL.exists():
        pytest.skip(f"the kernel has no huge pages of {HUGE} bytes")
    before, wanted = int(HUGE_POOL.read_text()), SIZE // HUGE
    free = HUGE_POOL.with_name("free_hugepages")
    try:
        for _ in range(600):  # pages that were just given back are counted for a moment
            HUGE_POOL.write_text(str(before + wanted))
            if int(free.read_text()) >= wanted:
                break
            time.sleep(0.1)
        else:
            pytest.skip(f"the kernel found {free.read_text().strip()} of {wanted} huge pages")
        yield
    finally:
        HUGE_POOL.write_text(str(before))


class Rig:
    """Pairs on devices of their own: rings at the start of one region, buffers in another."""

    def __init__(
        self,
        stack: ExitStack,
        namespace: NetNamespace,
        device: str,
        space: AddressSpace,
        *,
        rings: Region,
        buffers: Region,
        pairs: int = 1,
        more: Sequence[VhostNet] = (),
    ) -> None:
        self.namespace = namespace
        self.space = space
        self.tap = stack.enter_context(namespace.run(lambda: Tap.open("tap0", pairs)))
        self.devices = [
            stack.enter_context(VhostNet.at(device, f"{device} {pair}")) for pair in range(pairs)
        ]
        for vhost, queue in zip(self.devices, self.tap.queues, strict=True):
            vhost.set_owner()
            vhost.set_features(FEATURES)
            queue.set_vnet_hdr_size(12)
        space.register(VhostMemory([*self.devices, *more]))
        self.rings, end = place_rings(rings.gpa, 2 * pairs, RING_SIZE)
        self.events = [
            {name: stack.enter_context(EventFd.create(name)) for name in ("kick", "call", "err")}
            for _ in self.rings
        ]
        for index, ring in enumerate(self.rings):
            for part, (gpa, length) in ring.parts().items():
                stack.enter_context(space.pin(gpa, length, f"queue {index} {part}"))
            self._configure(index, ring)
        queues = [
            QueueConfig(RING_SIZE, r.desc, r.avail, r.used, e["kick"].fileno(), e["call"].fileno())
            for r, e in zip(self.rings, self.events, strict=True)
        ]
        arena = end if buffers is rings else buffers.gpa
        self.driver = stack.enter_context(
            NetDriver(
                space,
                list(zip(queues[::2], queues[1::2], strict=True)),
                FEATURES,
                (arena, buffers.gpa + buffers.size - arena),
            )
        )
        self.mac = namespace.run(self._up)

    def _configure(self, index: int, ring: RingPlacement) -> None:
        vhost, events = self.devices[index // 2], self.events[index]
        vhost.set_vring_num(index % 2, ring.size)
        vhost.set_vring_base(index % 2, 0)
        parts = {
            name: self.space.hva(gpa, length, name) for name, (gpa, length) in ring.parts().items()
        }
        vhost.set_vring_addr(index % 2, **parts)
        vhost.set_vring_kick(index % 2, events["kick"].fileno())
        vhost.set_vring_call(index % 2, events["call"].fileno())
        vhost.set_vring_err(index % 2, events["err"].fileno())

    @staticmethod
    def _up() -> bytes:
        # No frame comes but those that a test sends.
        Path("/proc/sys/net/ipv6/conf/tap0/disable_ipv6").write_text("1")
        with closing(Links()) as links:
            links.open()
            Plan(link_steps(links, "tap0", LinkSettings((f"{HOST}/24",), mtu=1500))).run()
            return bytes.fromhex(links.state("tap0").mac.replace(":", ""))

    def attach(self) -> None:
        for vhost, queue in zip(self.devices, self.tap.queues, strict=True):
            for ring in (0, 1):
                vhost.set_backend(ring, queue.fileno())

    def start(self) -> None:
        for pair in self.driver.pairs:
            pair.start()

    def errors(self) -> list[int]:
        return [events["err"].drain() for events in self.events]

    def used_index(self, ring: int) -> int:
        """What the device wrote there, of 16 bits (struct vring_used)."""
        hva = self.space.hva(self.rings[ring].used, 4)
        return ctypes.c_uint16.from_address(hva + 2).value


class Flow:
    """Numbered datagrams both ways over one pair, as one flow, so that the tap keeps to it."""

    def __init__(self, stack: ExitStack, rig: Rig, pair: int) -> None:
        self.stream = Stream.for_mtu(1500, ipv6=False, number=pair)
        self.settled = 0
        self.tally = Tally()
        self.endpoint = stack.enter_context(Endpoint(rig.driver.pairs[pair], MAC, GUEST))
        sockets = HostSockets(rig.namespace.run)
        self.socket = stack.enter_context(sockets.receiver(4, HOST, TO_HOST + pair))
        self.socket.connect((GUEST, TO_GUEST + pair))
        self.endpoint.expect(self.stream, TO_GUEST + pair)
        self.endpoint.generate(self.stream, Peer(rig.mac, TO_HOST + pair, HOST), TO_GUEST + pair)
        stack.enter_context(Running(self.endpoint, f"endpoint {pair}"))
        self.receiver = StreamReceiver(self.stream, {4: self.socket}, self.tally)

    def exchange(self, more: Callable[[], bool]) -> None:
        """Send a window each way, and the next one as long as `more()`."""
        # The tap learns from the guest's datagrams which queue the flow belongs to.
        came = self._from_guest(WINDOW)
        while came and more():
            for k in range(self.settled, self.settled + WINDOW):
                self.socket.send(self.stream.payload(k))
            came = self._from_guest(self.settled + 2 * WINDOW)
            self.settled += WINDOW
            came = came and self.endpoint.wait_received(self.settled, PATIENCE)

    def _from_guest(self, until: int) -> bool:
        self.endpoint.goal = until
        self.tally.sent = until
        return self.receiver.receive(until)

    def check(self) -> None:
        counters = self.endpoint.counters()
        assert counters.received == self.settled > 0
        assert (counters.lost, counters.changed, counters.repeated) == (0, 0, 0)
        assert counters.bad_checksum == 0
        assert (self.tally.lost, self.tally.changed) == (0, 0)
        assert counters.sent == self.tally.sent


def start_flows(stack: ExitStack, rig: Rig) -> list[Flow]:
    flows = [Flow(stack, rig, pair) for pair in range(len(rig.devices))]
    # Until the address is resolved, the host keeps less than the first windows of two flows.
    assert HostSockets(rig.namespace.run).ping(4, GUEST, [0]) == 1
    return flows


def prove(rig: Rig, datagrams: int = 512) -> None:
    """Every datagram arrives, each way, on pair 0, and the device finds nothing malformed."""
    with ExitStack() as stack:
        [flow] = start_flows(stack, rig)
        flow.exchange(lambda: flow.settled < datagrams)
        flow.check()
    assert not any(rig.errors())


def private(stack: ExitStack, slot: int, name: str, size: int = SIZE) -> MappedRegion:
    return stack.enter_context(MappedRegion.anonymous(GPA + slot * SLOT, size, name))


def every_kind(stack: ExitStack, folder: Path) -> Sequence[Region]:
    gpas = iter(range(GPA, GPA + 8 * SLOT, SLOT))
    owner = stack.enter_context(MappedRegion.memfd(0, SIZE))
    spare = stack.enter_context(MappedRegion.anonymous(0, SIZE))
    path = folder / "memory"
    path.write_bytes(bytes(SIZE + PAGE))
    made: list[MappedRegion | BorrowedRegion] = [
        MappedRegion.anonymous(next(gpas), SIZE, "anonymous"),
        MappedRegion.memfd(next(gpas), SIZE, "memfd"),
        MappedRegion.from_fd(next(gpas), SIZE, owner.fileno(), name="from_fd"),
        MappedRegion.hugetlb(next(gpas), SIZE, HUGE, "hugetlb"),
        MappedRegion.file(next(gpas), SIZE, path, PAGE, name="file"),
        MappedRegion.file(next(gpas), SIZE, path, shared=False, name="private file"),
        BorrowedRegion(next(gpas), SIZE, spare.hva, "borrowed"),
    ]
    for region in made:
        stack.enter_context(region)
    return made


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize(
    "kind", ["anonymous", "memfd", "from_fd", "hugetlb", "file", "private file", "borrowed"]
)
def test_rings_and_buffers_work_in_memory_of_each_kind(
    stack: ExitStack, namespace: NetNamespace, device: str, tmp_path: Path, kind: str
) -> None:
    """Rings in one kind and buffers in the next: each is used for both."""
    regions = every_kind(stack, tmp_path)
    space = AddressSpace(regions)
    names = [region.name for region in space.regions]
    rings = regions[names.index(kind)]
    buffers = regions[(names.index(kind) + 1) % len(names)]
    rig = Rig(stack, namespace, device, space, rings=rings, buffers=buffers)
    rig.attach()
    rig.start()
    prove(rig)
    assert min(rig.used_index(0), rig.used_index(1)) >= 512


def test_memory_comes_and_goes_while_frames_flow(
    stack: ExitStack, namespace: NetNamespace, device: str
) -> None:
    """A region by itself, and one that makes the rings' entry of the table longer."""
    whole = private(stack, 0, "whole", 2 * SIZE)
    low = BorrowedRegion(GPA, SIZE, whole.hva, "low")
    behind = BorrowedRegion(GPA + SIZE, SIZE, whole.hva + SIZE, "behind")
    space = AddressSpace([low])
    rig = Rig(stack, namespace, device, space, rings=low, buffers=low, pairs=2)
    rig.attach()
    rig.start()
    flows = start_flows(stack, rig)
    enough = threading.Event()

    def moved_on(before: list[int]) -> bool:
        progress = all(flow.settled > was for flow, was in zip(flows, before, strict=True))
        return progress or any(flow.done() for flow in running)

    with ThreadPoolExecutor(len(flows)) as pool:
        running = [pool.submit(flow.exchange, lambda: not enough.is_set()) for flow in flows]
        try:
            for _ in range(200):
                before = [flow.settled for flow in flows]
                with MappedRegion.memfd(GPA + SLOT, SIZE, "dimm1") as dimm:
                    with space.transaction():
                        space.add(dimm)
                        space.add(behind)
                    assert [region.size for region in space.table.regions] == [2 * SIZE, SIZE]
                    space.remove("dimm1")
                space.remove(behind)
                until(partial(moved_on, before), "datagrams between two changes")
        finally:
            enough.set()
        for each in running:
            each.result()
    for flow in flows:
        flow.check()
        assert flow.settled >= 200 * WINDOW
    assert not any(rig.errors())


def test_memory_added_to_a_running_device_takes_frames(
    stack: ExitStack, namespace: NetNamespace, device: str
) -> None:
    rings, buffers = private(stack, 0, "rings", 1 << 20), private(stack, 1, "buffers")
    space = AddressSpace([rings, buffers])
    rig = Rig(stack, namespace, device, space, rings=rings, buffers=buffers)
    space.remove("buffers")
    rig.attach()
    space.add(buffers)
    rig.start()
    prove(rig)


def test_memory_in_use_by_a_ring_is_not_removed(
    stack: ExitStack, namespace: NetNamespace, device: str
) -> None:
    rings, buffers = private(stack, 0, "rings", 1 << 20), private(stack, 1, "buffers")
    space = AddressSpace([rings, buffers])
    rig = Rig(stack, namespace, device, space, rings=rings, buffers=buffers)
    rig.attach()
    rig.start()
    with pytest.raises(
        InvalidArgument,
        match=r"memory region 'rings' 0x100000000\+0x100000 is in use by queue 0 desc",
    ):
        space.remove("rings")
    prove(rig)


def test_a_device_that_refuses_leaves_the_others_with_the_memory_they_had(
    stack: ExitStack, namespace: NetNamespace, device: str
) -> None:
    rings, buffers = private(stack, 0, "rings", 1 << 20), private(stack, 1, "buffers")
    space = AddressSpace([rings, buffers])
    second = stack.enter_context(VhostNet.at(device, "the second"))
    second.set_owner()
    rig = Rig(stack, namespace, device, space, rings=rings, buffers=buffers, more=[second])
    rig.attach()
    rig.start()
    second.close()
    with pytest.raises(ClosedError, match="the second is closed"):
        space.remove("buffers")
    assert [region.name for region in space.regions] == ["rings", "buffers"]
    prove(rig)  # the first device was without the buffers for a moment, and no frame was there


def test_more_regions_than_the_device_takes_are_refused_by_number(
    stack: ExitStack, device: str
) -> None:
    limit = module.max_mem_regions()
    whole = private(stack, 0, "whole", (limit + 1) * PAGE)
    # Downwards in this process and upwards in the guest: no two of them merge.
    pages = [
        BorrowedRegion(n * PAGE, PAGE, whole.hva + whole.size - (n + 1) * PAGE, f"page {n}")
        for n in range(limit + 1)
    ]
    vhost = stack.enter_context(VhostNet.at(device))
    vhost.set_owner()
    space = AddressSpace(pages[:limit])
    space.register(VhostMemory([vhost]))
    with pytest.raises(
        InvalidArgument, match=f"{limit + 1} memory regions .* the device takes {limit}; "
    ):
        space.add(pages[limit])
    assert len(space.table.regions) == limit
    with pytest.raises(KernelError) as refusal:
        vhost.set_mem_table(pages)
    assert refusal.value.errno == errno.E2BIG
