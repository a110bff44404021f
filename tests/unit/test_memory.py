"""The memory table, ring placement and the mapped memory behind them."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostctl.control.memtable import GuestRegion, MemoryTable
from vhostctl.control.rings import place_rings
from vhostctl.errors import ClosedError, InvalidArgument, KernelError
from vhostctl.host.memory import BorrowedRegion, GuestMemory, MappedRegion, huge_page_sizes

PAGE = 4096
GPA = 0x1_0000_0000


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
    with pytest.raises(InvalidArgument, match=r"0x1000\+0x1000 overlaps memory region 0x0\+0x2000"):
        MemoryTable([GuestRegion(0, 2 * PAGE, 0), GuestRegion(PAGE, PAGE, 0)])
    apart = [GuestRegion(n * PAGE, PAGE, 2 * n * PAGE) for n in range(65)]
    MemoryTable(apart[:64], 64)
    with pytest.raises(
        InvalidArgument, match=r"65 memory regions .*merged, the device takes 64; .*max_mem_regions"
    ):
        MemoryTable(apart, 64)


def test_neighbours_are_one_entry() -> None:
    table = MemoryTable(
        [
            GuestRegion(3 * PAGE, PAGE, 8 * PAGE),  # hva follows another than its neighbour
            GuestRegion(PAGE, PAGE, 6 * PAGE),
            GuestRegion(2 * PAGE, PAGE, 7 * PAGE),
            GuestRegion(5 * PAGE, PAGE, 9 * PAGE),  # a hole below
            GuestRegion(6 * PAGE, PAGE, 20 * PAGE),
        ],
        3,
    )
    assert table.regions == (
        GuestRegion(PAGE, 3 * PAGE, 6 * PAGE),
        GuestRegion(5 * PAGE, PAGE, 9 * PAGE),
        GuestRegion(6 * PAGE, PAGE, 20 * PAGE),
    )
    assert table.hva(2 * PAGE - 8, 16, "x") == 7 * PAGE - 8
    assert table.find(5 * PAGE, 2 * PAGE) is None
    assert table.find(4 * PAGE, 1) is None
    assert table.find(PAGE, -1) is None
    assert table.end == 7 * PAGE
    assert MemoryTable([]).end == 0
    assert MemoryTable([]).find(0, 1) is None


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


Kind = Callable[[Path], MappedRegion]
KINDS: dict[str, Kind] = {
    "anonymous": lambda _: MappedRegion.anonymous(GPA, 4 * PAGE, "low"),
    "memfd": lambda _: MappedRegion.memfd(GPA, 4 * PAGE, "low"),
    "file": lambda path: MappedRegion.file(GPA, 4 * PAGE, path, 2 * PAGE, name="low"),
    "private file": lambda path: MappedRegion.file(
        GPA, 4 * PAGE, path, 2 * PAGE, shared=False, name="low"
    ),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(bytes(6 * PAGE))
    return path


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_of_each_kind(kind: str, file: Path) -> None:
    before = descriptors()
    with KINDS[kind](file) as region:
        assert (region.gpa, region.size, region.name) == (GPA, 4 * PAGE, "low")
        assert region.hva % PAGE == 0
        ctypes.memmove(region.hva + PAGE, b"written", 7)
        with region.view() as view:
            assert (view.nbytes, bytes(view[PAGE : PAGE + 7])) == (4 * PAGE, b"written")
        assert (file.read_bytes()[3 * PAGE :][:7] == b"written") is (kind == "file")
        shared = kind in ("memfd", "file")
        if shared:
            offset = 2 * PAGE if kind == "file" else 0
            with MappedRegion.from_fd(0, PAGE, region.fileno(), offset + PAGE) as same:
                with same.view() as view:
                    assert bytes(view[:7]) == b"written"
                assert same.fileno() != region.fileno()
                assert os.path.samestat(os.fstat(same.fileno()), os.fstat(region.fileno()))
        else:
            with pytest.raises(InvalidArgument, match=r"'low' 0x100000000\+0x4000 is private"):
                region.fileno()
    region.close()
    assert descriptors() == before
    for use in (region.view, region.fileno):
        with pytest.raises(ClosedError, match=r"'low' .* is closed"):
            use()


def test_memory_stays_mapped_while_a_view_of_it_is_there() -> None:
    region = MappedRegion.memfd(GPA, PAGE)
    view = region.view()
    whole = (ctypes.c_char * PAGE).from_buffer(view)
    region.close()
    view[0] = 7
    assert whole[0] == b"\7"
    here = f"{region.hva:x}-{region.hva + PAGE:x} "
    assert here in Path("/proc/self/maps").read_text()
    del whole
    view.release()
    assert here not in Path("/proc/self/maps").read_text()


def test_a_borrowed_region_is_left_as_it_is() -> None:
    with MappedRegion.anonymous(GPA, PAGE) as owner, owner.view() as view:
        with BorrowedRegion(0, PAGE, owner.hva, "theirs") as region:
            assert (region.gpa, region.size, region.hva) == (0, PAGE, owner.hva)
        view[0] = 1
    for gpa, size, hva in ((1, PAGE, PAGE), (0, 1, PAGE), (0, PAGE, 8), (0, PAGE, 0)):
        with pytest.raises(InvalidArgument, match=r"use (a multiple|multiples) of 4096"):
            BorrowedRegion(gpa, size, hva)


@pytest.mark.parametrize(
    "gpa_size", [(1, PAGE), (0, PAGE + 1), (0, 0), (-PAGE, PAGE), (0, 1 << 63)]
)
@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
def test_a_region_that_cannot_be_is_refused(kind: str, gpa_size: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match="is not aligned to 4096 bytes"):
        getattr(MappedRegion, kind)(*gpa_size)


def test_a_file_that_cannot_be_mapped_is_refused(file: Path, tmp_path: Path) -> None:
    before = descriptors()
    with pytest.raises(
        InvalidArgument, match=r"the file has 24576 bytes, 28672 are to be mapped; .*lengthen it"
    ):
        MappedRegion.file(GPA, 5 * PAGE, file, 2 * PAGE)
    for offset in (8, -PAGE):
        with pytest.raises(InvalidArgument, match=f"offset {offset}; use a multiple of 4096"):
            MappedRegion.file(GPA, PAGE, file, offset)
    with pytest.raises(FileNotFoundError, match=r"open on .*nothing"):
        MappedRegion.file(GPA, PAGE, tmp_path / "nothing")
    with pytest.raises(KernelError, match=r"dup on descriptor -1: .*EBADF"):
        MappedRegion.from_fd(GPA, PAGE, -1)
    reader = os.open(file, os.O_RDONLY)
    try:
        with pytest.raises(PermissionError, match="mmap on memory region 0x100000000"):
            MappedRegion.from_fd(GPA, PAGE, reader)
        assert stat.S_ISREG(os.fstat(reader).st_mode)  # ours to close, and still open
    finally:
        os.close(reader)
    assert descriptors() == before


def test_huge_pages_that_are_not_there_are_named() -> None:
    for size in (PAGE, 3 << 20, 0, -1):
        with pytest.raises(InvalidArgument, match=f"huge pages of {size} bytes; there are: "):
            MappedRegion.hugetlb(GPA, 1 << 30, size)
    before = descriptors()
    for size in huge_page_sizes():
        with pytest.raises(InvalidArgument, match=f"not aligned to {size} bytes"):
            MappedRegion.hugetlb(GPA, size - PAGE, size)
        count = (1 << 46) // size  # more than any machine has
        with pytest.raises(
            KernelError, match=f"{count} huge pages must be free: raise .*{size >> 10}kB/nr_huge"
        ) as failure:
            MappedRegion.hugetlb(GPA, 1 << 46, size)
        assert failure.value.errno == errno.ENOMEM
    assert descriptors() == before
