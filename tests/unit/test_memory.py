"""The memory table, ring placement and the mapped memory behind them."""

from __future__ import annotations

import ctypes
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostctl.control.memtable import GuestRegion, MemoryTable
from vhostctl.control.rings import place_rings
from vhostctl.errors import ClosedError, InvalidArgument
from vhostctl.host.memory import GuestMemory

PAGE = 4096


def test_a_range_must_lie_inside_one_region() -> None:
    table = MemoryTable([GuestRegion(0, PAGE, 0x10000), GuestRegion(PAGE, PAGE, 0x90000)])
    assert table.hva(PAGE - 1, 1, "x") == 0x10000 + PAGE - 1
    assert table.hva(2 * PAGE - 8, 8, "x") == 0x90000 + PAGE - 8
    for gpa, length in ((PAGE - 1, 2), (2 * PAGE - 1, 2), (2 * PAGE, 1), (1 << 63, 1)):
        with pytest.raises(InvalidArgument, match=r"used ring at .* outside every memory region"):
            table.hva(gpa, length, "used ring")


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (GuestRegion(1, PAGE, 0), "gpa 0x1 is not aligned"),
        (GuestRegion(0, PAGE + 512, 0), "size 0x1200 is not aligned"),
        (GuestRegion(0, PAGE, 8), "hva 0x8 is not aligned"),
        (GuestRegion(0, 0, 0), "empty"),
        (GuestRegion((1 << 64) - PAGE, 2 * PAGE, 0), "wraps"),
        (GuestRegion(-PAGE, PAGE, 0), "gpa"),
    ],
)
def test_a_bad_region_is_refused(region: GuestRegion, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        MemoryTable([region])


def test_overlap_and_too_many_regions_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="0x1000 overlaps 0x0"):
        MemoryTable([GuestRegion(0, 2 * PAGE, 0), GuestRegion(PAGE, PAGE, 0)])
    regions = [GuestRegion(n * PAGE, PAGE, n * PAGE) for n in range(65)]
    MemoryTable(regions[:64], 64)
    with pytest.raises(InvalidArgument, match="65 memory regions, the device takes 64; merge"):
        MemoryTable(regions, 64)


@pytest.mark.parametrize("size", [0, 3, 100, 65536, -2])
def test_a_bad_queue_size_is_refused(size: int) -> None:
    with pytest.raises(InvalidArgument, match=f"queue size {size}; .*power of two"):
        place_rings(0, 1, size)


@given(gpa=st.integers(0, 1 << 40), count=st.integers(1, 64), power=st.integers(0, 15))
def test_rings_are_aligned_and_apart(gpa: int, count: int, power: int) -> None:
    rings, end = place_rings(gpa, count, 1 << power)
    spans = sorted(part for ring in rings for part in ring.parts().values())
    for (low, length), (high, _) in itertools.pairwise(spans):
        assert low + length <= high
    assert spans[0][0] >= gpa
    assert sum(spans[-1]) <= end
    for ring in rings:
        assert (ring.desc % 16, ring.avail % 2, ring.used % 4) == (0, 0, 0)


def test_guest_memory_is_mapped_where_it_says() -> None:
    with GuestMemory([(0x10000, PAGE), (0x40000, 2 * PAGE)]) as memory:
        view = memory.regions[1].view()
        view[4097] = 42
        view.release()
        assert ctypes.c_uint8.from_address(memory.hva(0x40000 + 4097, 1)).value == 42
        with pytest.raises(InvalidArgument, match="outside every memory region"):
            memory.hva(0x10000 + PAGE - 1, 2)
        region = memory.regions[0]
    with pytest.raises(ClosedError):
        region.view()
    memory.close()


@pytest.mark.parametrize(
    "regions", [[(1, PAGE)], [(0, 100)], [(0, 0)], [(0, 2 * PAGE), (PAGE, PAGE)]]
)
def test_guest_memory_refuses_bad_regions(regions: list[tuple[int, int]]) -> None:
    with pytest.raises(InvalidArgument):
        GuestMemory(regions)
