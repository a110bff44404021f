"""The table of a vIOMMU, and the answers to misses, against devices that only keep accounts."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostctl.abi import vhost
from vhostctl.control.iotlb import Iotlb, IotlbCounters, Miss
from vhostctl.control.iovamap import IovaMap, Mapping
from vhostctl.control.memtable import GuestRegion, MemoryTable
from vhostctl.errors import InvalidArgument, KernelError, kernel_error
from vhostctl.host.eventfd import EventFd
from vhostctl.host.vhost import IotlbMessage
from vhostctl.jobs.running import Running

PAGE = 4096
RO, WO, RW = vhost.VHOST_ACCESS_RO, vhost.VHOST_ACCESS_WO, vhost.VHOST_ACCESS_RW
IOVA, GPA, HVA = 0x7000_0000_0000, 0x1_0000_0000, 0x5555_0000_0000
MEMORY = MemoryTable([GuestRegion(GPA, 64 * PAGE, HVA)])


class Device:
    """vhost's side: misses that wait, and the translations that it was told."""

    def __init__(self) -> None:
        self._event = EventFd.create()
        self._misses: list[tuple[int, int]] = []
        self.entries: dict[int, tuple[int, int, int]] = {}  # by iova: size, hva, perm
        self.told: list[int] = []
        self.error = 0
        self.before_write: Callable[[int], object] = lambda _: None

    def ask(self, iova: int, perm: int = RO) -> None:
        self._misses.append((iova, perm))
        self._event.signal()

    def fileno(self) -> int:
        return self._event.fileno()

    def read_message(self) -> IotlbMessage:
        if not self._misses:
            self._event.drain()
            raise kernel_error(errno.EAGAIN, "read", "fake")
        message = vhost.vhost_msg(type=vhost.VHOST_IOTLB_MSG)
        message.iotlb.iova, message.iotlb.perm = self._misses.pop(0)
        message.iotlb.type = vhost.VHOST_IOTLB_MISS
        return message

    def write_message(self, message: IotlbMessage) -> None:
        told = message.iotlb
        self.before_write(told.type)
        if self.error:
            raise kernel_error(self.error, "write", "fake")
        self.told.append(told.type)
        if told.type == vhost.VHOST_IOTLB_UPDATE:
            self.entries[told.iova] = (told.size, told.uaddr, told.perm)
            return
        assert told.type == vhost.VHOST_IOTLB_INVALIDATE
        last = (told.iova + told.size - 1) % (1 << 64)
        for iova, (size, _, _) in list(self.entries.items()):
            if iova <= last and told.iova < iova + size:
                del self.entries[iova]

    def close(self) -> None:
        self._event.close()


@pytest.fixture
def device() -> Iterator[Device]:
    with closing(Device()) as made:
        yield made


@pytest.fixture
def iotlb(device: Device) -> Iterator[Iotlb]:
    with Iotlb([device], IovaMap(), MEMORY) as made:
        yield made


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 24), st.integers(1, 8), st.sampled_from([RO, RW]))
    )
)
def test_the_table_is_what_a_page_by_page_one_would_be(
    steps: list[tuple[bool, int, int, int]],
) -> None:
    table, model = IovaMap(), dict[int, tuple[int, int]]()
    for number, (add, page, count, perm) in enumerate(steps):
        pages = range(page, page + count)
        gpa = number * 64
        if not add:
            gone = table.unmap(page * PAGE, count * PAGE)
            expected = {p: model.pop(p) for p in pages if p in model}
            assert by_page(gone) == expected
        elif any(p in model for p in pages):
            with pytest.raises(InvalidArgument, match="overlaps the mapping"):
                table.map(page * PAGE, count * PAGE, gpa * PAGE, perm)
        else:
            table.map(page * PAGE, count * PAGE, gpa * PAGE, perm)
            model |= {p: (gpa + p - page, perm) for p in pages}
    found = list(table)
    assert by_page(found) == model
    assert found == sorted(found, key=lambda m: m.iova)
    for page in range(34):
        around = table.translate(page * PAGE + 17)
        assert (around is not None) == (page in model)
        assert around is None or (around in found and page in by_page([around]))


def by_page(mappings: list[Mapping]) -> dict[int, tuple[int, int]]:
    return {
        (m.iova + at) // PAGE: ((m.gpa + at) // PAGE, m.perm)
        for m in mappings
        for at in range(0, m.size, PAGE)
    }


@pytest.mark.parametrize(
    ("iova", "size", "gpa", "perm", "message"),
    [
        (1, PAGE, GPA, RW, "iova 0x1"),
        (IOVA, 1, GPA, RW, r"\+0x1;"),
        (IOVA, 0, GPA, RW, r"\+0x0;"),
        (-PAGE, PAGE, GPA, RW, "iova -0x1000"),
        (2**64 - PAGE, 2 * PAGE, GPA, RW, "iova 0xfffffffffffff000"),
        (IOVA, PAGE, 7, RW, "gpa 0x7"),
        (IOVA, 2 * PAGE, 2**64 - PAGE, RW, "gpa 0xfffffffffffff000"),
        (IOVA, PAGE, GPA, 0, "permission 0"),
        (IOVA, PAGE, GPA, 4, "permission 4"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(
    iova: int, size: int, gpa: int, perm: int, message: str
) -> None:
    table = IovaMap()
    with pytest.raises(InvalidArgument, match=message):
        table.map(iova, size, gpa, perm)
    assert list(table) == []


def test_an_overlap_names_both() -> None:
    table = IovaMap()
    table.map(0x3000, 0x3000, 0)
    with pytest.raises(InvalidArgument) as refusal:
        table.map(0x1000, 0x3000, 0)
    assert str(refusal.value) == (
        "iova 0x1000+0x3000 overlaps the mapping iova 0x3000+0x3000; unmap that first"
    )


def test_all_there_is_can_be_mapped() -> None:
    table = IovaMap()
    table.map(0, 2**64, 0)
    assert table.translate(2**64 - 1) == Mapping(0, 2**64, 0, RW)
    assert [m.size for m in table.unmap(PAGE, PAGE)] == [PAGE]
    assert [(m.iova, m.gpa) for m in table] == [(0, 0), (2 * PAGE, 2 * PAGE)]


def test_a_miss_is_answered_with_the_whole_mapping(iotlb: Iotlb, device: Device) -> None:
    iotlb.map(IOVA, 4 * PAGE, GPA + PAGE, RO)
    device.ask(IOVA + 2 * PAGE + 5)
    assert iotlb.handle() == 1
    assert device.entries == {IOVA: (4 * PAGE, HVA + PAGE, RO)}
    assert iotlb.handle() == 0


def test_a_mapping_over_two_regions_is_answered_in_pieces(device: Device) -> None:
    two = MemoryTable([GuestRegion(GPA, 2 * PAGE, HVA), GuestRegion(GPA + 2 * PAGE, PAGE, 0)])
    with Iotlb([device], IovaMap(), two) as iotlb:
        iotlb.map(IOVA, 8 * PAGE, GPA - 2 * PAGE)
        device.ask(IOVA + 3 * PAGE)
        device.ask(IOVA + 4 * PAGE + 1)
        for hole in (IOVA, IOVA + 5 * PAGE):
            device.ask(hole)
        assert iotlb.handle() == 4
        assert device.entries == {
            IOVA + 2 * PAGE: (2 * PAGE, HVA, RW),
            IOVA + 4 * PAGE: (PAGE, 0, RW),
        }
        assert [miss.iova for miss in iotlb.missing()] == [IOVA, IOVA + 5 * PAGE]


def test_misses_that_wait_together_take_one_update(iotlb: Iotlb, device: Device) -> None:
    iotlb.map(IOVA, 4 * PAGE, GPA)
    for at in range(4):
        device.ask(IOVA + at * PAGE)
    iotlb.handle()
    assert device.told == [vhost.VHOST_IOTLB_UPDATE]
    assert iotlb.counters() == IotlbCounters(misses=4, answered=4, updates=1)


def test_a_mapping_that_comes_late_answers(iotlb: Iotlb, device: Device) -> None:
    device.ask(IOVA + 7)
    device.ask(IOVA + 9 * PAGE)
    iotlb.handle()
    assert device.told == []
    iotlb.map(IOVA - PAGE, 2 * PAGE, GPA)
    assert device.entries == {IOVA - PAGE: (2 * PAGE, HVA, RW)}
    assert iotlb.missing() == [Miss(0, IOVA + 9 * PAGE, RO)]
    assert iotlb.counters() == IotlbCounters(misses=2, unanswered=2, updates=1)
    iotlb.unmap(IOVA - PAGE, 2 * PAGE)
    iotlb.map(IOVA - PAGE, 2 * PAGE, GPA)
    assert device.entries == {}  # nobody waits any more


def test_a_mapping_that_forbids_it_is_no_answer(iotlb: Iotlb, device: Device) -> None:
    iotlb.map(IOVA, PAGE, GPA, RO)
    device.ask(IOVA, WO)
    device.ask(IOVA, RO)
    iotlb.handle()
    assert iotlb.missing() == [Miss(0, IOVA, WO)]
    assert device.entries == {IOVA: (PAGE, HVA, RO)}
    iotlb.unmap(IOVA, PAGE)
    iotlb.map(IOVA, PAGE, GPA, RW)
    assert device.entries == {IOVA: (PAGE, HVA, RW)}


def test_what_is_remembered_is_bounded(iotlb: Iotlb, device: Device) -> None:
    for at in range(3000):
        device.ask(IOVA + at * PAGE)
    handled = [iotlb.handle() for _ in range(4)]
    assert handled == [1024, 1024, 952, 0]
    assert [m.iova for m in iotlb.missing()] == [IOVA + at * PAGE for at in range(3000 - 256, 3000)]
    for _ in range(500):  # one ring that is kicked again and again is one miss
        device.ask(IOVA + 2744 * PAGE)
    iotlb.handle()
    assert len(iotlb.missing()) == 256
    assert iotlb.missing()[-1].iova == IOVA + 2744 * PAGE


def test_a_withdrawal_is_told_to_every_device(device: Device) -> None:
    with closing(Device()) as other, Iotlb([device, other], IovaMap(), MEMORY) as iotlb:
        iotlb.map(IOVA, 4 * PAGE, GPA)
        for asking in (device, other):
            asking.ask(IOVA)
        iotlb.handle()
        assert iotlb.unmap(IOVA + PAGE, PAGE) == [Mapping(IOVA + PAGE, PAGE, GPA + PAGE, RW)]
        assert device.entries == other.entries == {}
        assert iotlb.counters().invalidated == 2
        assert iotlb.unmap(IOVA + PAGE, PAGE) == []
        assert iotlb.counters().invalidated == 2
        device.ask(IOVA + 3 * PAGE)
        iotlb.handle()
        assert device.entries == {IOVA + 2 * PAGE: (2 * PAGE, HVA + 2 * PAGE, RW)}


def test_one_device_that_fails_keeps_no_other_from_being_told(device: Device) -> None:
    with closing(Device()) as other, Iotlb([device, other], IovaMap(), MEMORY) as iotlb:
        iotlb.map(IOVA, PAGE, GPA)
        other.ask(IOVA)
        iotlb.handle()
        device.error = errno.EIO
        with pytest.raises(KernelError, match="Input/output error"):
            iotlb.unmap(IOVA, PAGE)
        assert other.entries == {}


def test_a_device_that_does_not_translate_any_more_is_no_error(
    iotlb: Iotlb, device: Device
) -> None:
    iotlb.map(IOVA, PAGE, GPA)
    device.error = errno.EFAULT
    device.ask(IOVA)
    iotlb.handle()
    iotlb.unmap(IOVA, PAGE)
    assert iotlb.counters() == IotlbCounters(misses=1, refused=1)
    device.error = errno.EIO
    iotlb.map(IOVA, PAGE, GPA)
    device.ask(IOVA)
    with pytest.raises(KernelError, match="Input/output error"):
        iotlb.handle()


def test_an_answer_under_way_is_taken_back_by_the_withdrawal(iotlb: Iotlb, device: Device) -> None:
    iotlb.map(IOVA, PAGE, GPA)
    withdrawal = threading.Thread(target=iotlb.unmap, args=(IOVA, PAGE))

    def meanwhile(kind: int) -> None:
        if kind == vhost.VHOST_IOTLB_UPDATE:  # looked up already, not told yet
            withdrawal.start()
            while list(iotlb.mappings):
                pass

    device.before_write = meanwhile
    device.ask(IOVA)
    iotlb.handle()
    withdrawal.join()
    assert device.told == [vhost.VHOST_IOTLB_UPDATE, vhost.VHOST_IOTLB_INVALIDATE]
    assert device.entries == {}


def test_an_address_is_told_before_it_is_asked_for(iotlb: Iotlb, device: Device) -> None:
    iotlb.map(IOVA, PAGE, GPA)
    iotlb.map(IOVA + PAGE, 2 * PAGE, GPA + 8 * PAGE)
    iotlb.prime(device, IOVA + 0xF00, PAGE)
    assert device.entries == {
        IOVA: (PAGE, HVA, RW),
        IOVA + PAGE: (2 * PAGE, HVA + 8 * PAGE, RW),
    }
    with pytest.raises(InvalidArgument, match=f"iova {IOVA + 3 * PAGE:#x} has no mapping"):
        iotlb.prime(device, IOVA + 2 * PAGE, PAGE + 1)
    device.error = errno.EFAULT
    with pytest.raises(KernelError, match="Bad address"):
        iotlb.prime(device, IOVA, 1)


def test_memory_that_goes_takes_its_translations_along(device: Device) -> None:
    low, high = GuestRegion(GPA, PAGE, HVA), GuestRegion(GPA + 8 * PAGE, PAGE, HVA + 8 * PAGE)
    both, one, none = MemoryTable([low, high]), MemoryTable([low]), MemoryTable([])
    moved = MemoryTable([low, GuestRegion(high.gpa, PAGE, HVA)])
    with Iotlb([device], IovaMap()) as iotlb:
        iotlb.map(IOVA, 16 * PAGE, GPA)
        device.ask(IOVA + 8 * PAGE)
        iotlb.handle()
        iotlb.commit(none, both)  # as an AddressSpace tells who registers
        assert device.entries == {IOVA + 8 * PAGE: (PAGE, high.hva, RW)}
        iotlb.commit(both, moved)
        assert device.entries == {}
        device.ask(IOVA + 8 * PAGE)
        iotlb.handle()
        assert device.entries == {IOVA + 8 * PAGE: (PAGE, HVA, RW)}
        iotlb.commit(moved, one)
        assert device.entries == {}
        device.ask(IOVA + 8 * PAGE)
        iotlb.handle()
        assert iotlb.missing() == [Miss(0, IOVA + 8 * PAGE, RO)]
        before = iotlb.counters().invalidated
        iotlb.commit(one, both)
        assert (iotlb.missing(), iotlb.counters().invalidated) == ([], before)


def test_memory_that_a_device_refuses_to_give_up_stays(iotlb: Iotlb, device: Device) -> None:
    iotlb.map(IOVA, PAGE, GPA)
    device.error = errno.EIO
    with pytest.raises(KernelError, match="Input/output error"):
        iotlb.commit(MEMORY, MemoryTable([]))
    device.error = 0
    device.ask(IOVA)
    iotlb.handle()
    assert device.entries == {IOVA: (PAGE, HVA, RW)}


def test_a_stop_before_the_run_ends_it(iotlb: Iotlb) -> None:
    iotlb.stop()
    iotlb.run()


def test_a_thread_answers_several_devices(device: Device) -> None:
    with closing(Device()) as other, Iotlb([device, other], IovaMap(), MEMORY) as iotlb:
        iotlb.map(IOVA, PAGE, GPA)
        told = threading.Semaphore(0)
        for asking in (device, other):
            asking.before_write = lambda _: told.release()
        for _ in range(2):  # it can run again
            with Running(iotlb, "iotlb"):
                for asking in (other, device):
                    asking.ask(IOVA)
                    assert told.acquire(timeout=10)
        assert iotlb.counters() == IotlbCounters(misses=4, answered=4, updates=4)


def test_an_error_ends_the_run(iotlb: Iotlb, device: Device) -> None:
    iotlb.map(IOVA, PAGE, GPA)
    device.error = errno.EIO
    device.ask(IOVA)
    with pytest.raises(KernelError, match="Input/output error"):
        iotlb.run()
