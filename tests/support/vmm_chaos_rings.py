"""What a guest gets wrong at random: values, and the virtqueues that it makes."""

from __future__ import annotations

import random
import struct

from tests.support.vmm_hostile import RAM, Cpu
from vhostctl.abi import virtio
from vhostctl.control.rings import RingPlacement
from vhostctl.host.memory import PAGE
from vhostctl.vmm import layout

QUEUES = 5
EVERYTHING = (1 << 64) - 1

_DESC = struct.Struct("<QIHH")
_ROOM = 1 << 16  # bytes of RAM for each virtqueue, from _RINGS on
_RINGS = 1 << 20
# Under an emulator chance is what takes longest: some of it is used more than once.
_FEW = 4
_MANY = 4096
_EDGES = (
    *(0, 0x1000, layout.EBDA, layout.KERNEL_MIN),
    *(layout.PCI_MEMORY.start, layout.IOAPIC, layout.LAPIC, layout.KVM_TSS),
    *(layout.HIGH_RAM, 1 << 44, (1 << 63) - 1, (1 << 64) - PAGE, (1 << 64) - 1),
)
_BEHIND = (-0x4001, -PAGE, -2, -1, 0, PAGE)  # the end of RAM


class Chance:
    """Numbers by `seed` as a guest would have them that has RAM up to `end`."""

    def __init__(self, seed: int, end: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 -- chance that can be repeated
        self.end = end
        self._edges = (*_EDGES, *(end + offset for offset in _BEHIND))

    def of(self, probability: float) -> bool:
        return self.rng.random() < probability

    def value(self) -> int:
        kinds = (0, 1, self.rng.getrandbits(8), self.rng.getrandbits(64), EVERYTHING)
        return self.rng.choice((*kinds, self.address()))

    def width(self) -> int:
        return self.rng.choice((1, 2, 4, 8))

    def address(self) -> int:
        if self.of(0.5):
            return self.rng.randrange(0, RAM, self.rng.choice((1, 2, 16, PAGE)))
        return self.rng.choice(self._edges)


class Rings:
    """The virtqueues of `cpu`; what is wrong with them is chosen by `chance`.

    Well-formed descriptors lie in the second half of RAM.
    """

    def __init__(self, cpu: Cpu, chance: Chance) -> None:
        self.placed = dict[int, RingPlacement]()
        self._cpu = cpu
        self._chance = chance
        self._rng = chance.rng
        self._available = dict[int, int]()
        self._tables = dict[tuple[bool, int], list[bytes]]()
        self._many_heads = dict[int, bytes]()
        self._spoiled = 0.0  # how many descriptors are bad: the first that is ends its ring

    def place(self, queue: int) -> RingPlacement:
        """Make a virtqueue, and return where it is."""
        self.placed[queue] = ring = self._placement(queue)
        self.fill(queue, fresh=True)
        return ring

    def place_legacy(self, queue: int) -> RingPlacement:
        """Do it where a driver of before virtio 1.0 has it."""
        size = 256 if queue < QUEUES - 1 else 64
        home = _RINGS + _ROOM * queue
        used = home + (0x2000 if size == 256 else 0x1000)
        self.placed[queue] = ring = RingPlacement(size, home, home + 16 * size, used)
        self.fill(queue, fresh=True)
        return ring

    def _placement(self, queue: int) -> RingPlacement:
        """Return where a virtqueue is: most of the time somewhere where it can be."""
        home = _RINGS + _ROOM * queue
        size = self._rng.choice((1, 2, 16, 64, 64, 256))
        ring = RingPlacement(size, home, home + 0x2000, home + 0x4000)
        if self._chance.of(0.9):
            return ring
        near = self._chance.end - self._rng.choice((16, 256, 0x1000, 0x2000))
        spoiled = {
            "desc": (self._chance.address(), near, ring.used),
            "avail": (self._chance.address(), near, ring.desc),
            "used": (self._chance.address(), near, ring.avail, ring.desc),
        }
        parts = {
            part: self._rng.choice((getattr(ring, part), *bad)) for part, bad in spoiled.items()
        }
        return RingPlacement(self._rng.choice((size, 0, 3, 0x8000, 0xFFFF)), **parts)

    def fill(self, queue: int, *, fresh: bool = False) -> None:
        """Write descriptors, some of which can be used, and make some of them available."""
        ring = self.placed[queue]
        size = max(1, min(ring.size, 256))
        if fresh:
            self._available[queue] = 0
            self._spoiled = self._rng.choice((0, 0, 0.002, 0.3))
            self._cpu.poke(ring.used, bytes(4))
        if fresh or self._chance.of(0.2):
            self._cpu.poke(ring.desc, self._table(queue, size))
        below = 1 << 16 if self._chance.of(self._spoiled / 3) else size
        more = (
            self._rng.choice((1, 1, 8, size, size))
            if not self._chance.of(self._spoiled / 9)
            else 0x8000
        )
        self._available[queue] = index = self._available.get(queue, 0) + more & 0xFFFF
        flags = self._rng.choice((0, 0, 1, 0xFFFF))
        entries = self._heads(below, size + 1)
        self._cpu.poke(ring.avail, struct.pack("<HH", flags, index) + entries)
        if self._chance.of(self._spoiled / 9):
            self._cpu.poke(ring.used, self._rng.randbytes(8 * size + 6))

    def _heads(self, below: int, count: int) -> bytes:
        """Return `count` heads of chains."""
        if below not in self._many_heads:
            heads = self._rng.choices(range(below), k=_MANY)
            self._many_heads[below] = struct.pack(f"<{_MANY}H", *heads)
        at = 2 * self._rng.randrange(_MANY - count)
        return self._many_heads[below][at : at + 2 * count]

    def _table(self, queue: int, size: int) -> bytes:
        """Return a table: one of a few good ones, as many of it bad as are to be."""
        receives = queue < QUEUES - 1 and not queue % 2
        tables = self._tables.setdefault((receives, size), [])
        if len(tables) < _FEW:
            made = (self._descriptor(receives, at, size) for at in range(size))
            tables.append(b"".join(made))
        table = bytearray(self._rng.choice(tables))
        bad = self._spoiled * (2 - self._spoiled) * size + self._rng.random()
        for at in self._rng.sample(range(size), min(int(bad), size)):
            place, flags = self._rng.choice(((True, False), (False, True), (True, True)))
            table[16 * at : 16 * at + 16] = self._descriptor(
                receives, at, size, bad_place=place, bad_flags=flags
            )
        return bytes(table)

    def _descriptor(
        self,
        receives: bool,
        at: int,
        size: int,
        *,
        bad_place: bool = False,
        bad_flags: bool = False,
    ) -> bytes:
        length = self._rng.choice((12, 64, 1526, 2048, 4096))
        flags = virtio.VRING_DESC_F_WRITE if receives else 0
        following = (at + 1) % size
        gpa = self._rng.randrange(RAM // 2, RAM - 4096)
        if bad_place:
            gpa, length = (
                self._chance.address(),
                self._rng.choice((0, 1, length, 1 << 16, 0xFFFF_FFFF)),
            )
        if bad_flags:
            flags ^= self._rng.randrange(8)
            following = self._rng.choice((at, following, self._rng.getrandbits(16)))
        if flags & virtio.VRING_DESC_F_INDIRECT:
            gpa, length = self._rng.choice((_RINGS, gpa)), 16 * self._rng.randrange(1, 40)
        return _DESC.pack(gpa, length, flags, following)

    def command(self, queue: int, command: bytes) -> None:
        """Make a command available on a control queue."""
        ring = self.placed[queue]
        size = max(1, min(ring.size, 64))
        gpa = RAM // 2 + _ROOM
        self._cpu.poke(gpa, command)
        chain = _DESC.pack(gpa, len(command), virtio.VRING_DESC_F_NEXT, 1 % size)
        chain += _DESC.pack(gpa + 128, 1, virtio.VRING_DESC_F_WRITE, 0)
        if self._chance.of(0.15):
            self._spoiled = 0.3
            chain = self._table(queue, size)
        self._cpu.poke(ring.desc, chain)
        self._available[queue] = index = self._available.get(queue, 0) + 1 & 0xFFFF
        self._cpu.poke(ring.avail + 4 + 2 * ((index - 1) % size), bytes(2))
        self._cpu.poke(ring.avail + 2, struct.pack("<H", index))
