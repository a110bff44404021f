"""A guest that does everything wrong, as a program: machine code for a vCPU in long mode."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from tests.support.vmm_chaos import Chaos
from tests.support.vmm_hostile import RAM, Cpu, Driver
from vhostctl.control.rings import RingPlacement
from vhostctl.host.memory import PAGE
from vhostctl.vmm import layout
from vhostctl.vmm.acpi import RESET_VALUE, SLEEP_TYPE_OFF
from vhostctl.vmm.virtio_pci import LEGACY_BAR, MODERN_BAR, MSIX_BAR

MEMORY = 128 << 20
LOAD = 48 << 20
"""Where the program is: what the devices write is below, in `RAM`, or at the end of MEMORY."""
ENTRY = LOAD + 0x200
END = b"this is the end"

_TOP = 1 << 32  # what is mapped ends here
_TABLES = 6 * PAGE
_STACK = 2 * PAGE
_KVMS = (range(0x20, 0x22), range(0x40, 0x44), range(0x61, 0x62), range(0xA0, 0xA2))
_ELCR = range(0x4D0, 0x4D2)
_SMI, _INIT = 2, 5
_PM1_CONTROL_HIGH = layout.PM1_CONTROL_PORTS.start + 1
_SLP_EN = 0x20
_COM1, _LCR, _MCR = (layout.SERIAL_PORTS.start + register for register in (0, 3, 4))
_OFF = SLEEP_TYPE_OFF << 10 | 1 << 13
_CODE_64, _DATA = 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
_CODE_SELECTOR = 0x10
_INTERRUPT_GATE = 0x8E
_HANDLER = b"\x48\xcf"  # iretq; without an EOI nothing comes twice, and no storm is one
_REGISTERS = {"eax": 0, "ecx": 1, "edx": 2, "esi": 6, "edi": 7}


class Code:
    """Machine code from `ENTRY` on. It has tables and a stack of its own: devices write to RAM."""

    def __init__(self) -> None:
        self._code = bytearray()
        stack = self._put(bytes(_STACK)) + _STACK
        gates = self._put(_HANDLER)
        entry = struct.pack(
            "<HHHHQ", gates & 0xFFFF, _CODE_SELECTOR, _INTERRUPT_GATE << 8, gates >> 16, 0
        )
        interrupts = self._table(entry * 256)
        segments = self._table(struct.pack("<4Q", 0, 0, _CODE_64, _DATA))
        pages = self._put(bytes(PAGE + _TABLES))
        pages = -(-pages // PAGE) * PAGE
        self._code[pages - ENTRY : pages - ENTRY + _TABLES] = _page_tables(pages)
        self.add(b"\xbc" + _long(stack & ~15))  # mov esp
        self.add(b"\x0f\x01\x14\x25" + _long(segments))  # lgdt
        self.add(b"\x0f\x01\x1c\x25" + _long(interrupts))  # lidt
        self.add(b"\xb8" + _long(pages) + b"\x0f\x22\xd8")  # mov cr3
        self.add(b"\xfb")  # sti

    def __bytes__(self) -> bytes:
        assert ENTRY + len(self._code) < MEMORY - (1 << 20), "the program is too long"
        return bytes(self._code)

    def add(self, code: bytes) -> None:
        self._code += code

    def _put(self, data: bytes) -> int:
        """Have `data` between instructions; return where."""
        self.add(b"\xe9" + _long(len(data)) + data)
        return ENTRY + len(self._code) - len(data)

    def _table(self, data: bytes) -> int:
        at = self._put(data)
        return self._put(struct.pack("<HQ", len(data) - 1, at))

    def copy(self, address: int, data: bytes) -> None:
        self.registers(esi=self._put(data), edi=address, ecx=len(data))
        self.add(b"\xf3\xa4")  # rep movsb

    def registers(self, **values: int) -> None:
        """Mov; eax gets all 64 bits of rax."""
        for name, value in values.items():
            move = bytes((0xB8 + _REGISTERS[name],))
            wide = name == "eax" and value >= _TOP
            self.add(b"\x48" + move + struct.pack("<Q", value) if wide else move + _long(value))

    def operate(self, width: int, opcode: int, rest: bytes = b"", *, repeat: bool = False) -> None:
        """Use an instruction of which `opcode` is the form of one byte, the next the others'."""
        prefix = {1: b"", 2: b"\x66", 4: b"", 8: b"\x48"}[width]
        code = prefix + bytes((opcode + (width > 1),)) + rest
        if repeat:
            code = b"\x66\xf3" + code[1:] if width == 2 else b"\xf3" + code
        self.add(code)

    def wait_for(self, address: int, value: int) -> None:
        """Until the word at `address` is `value`."""
        self.registers(edi=address)
        self.add(b"\x66\x81\x3f" + struct.pack("<H", value) + b"\x75\xf9")


class Program(Cpu):
    """Writes the accesses down; what would switch the machine off is made harmless.

    `ports` and `mmio` count those that must leave the guest for the VMM, whatever is mapped.
    """

    def __init__(self, slot: int, bars: dict[int, int], capabilities: dict[int, int]) -> None:
        super().__init__(slot, nullcontext())
        self.code = Code()
        self.ports = self.mmio = 0
        self._bars, self._capabilities = bars, capabilities

    def bar(self, index: int) -> int:
        return self._bars[index]

    def capabilities(self) -> dict[int, int]:
        return self._capabilities

    def out(self, port: int, value: int, width: int) -> None:
        self._port(port, width, value)

    def port(self, port: int, width: int) -> int:
        self._port(port, width)
        return 0

    def store(self, address: int, value: int, width: int) -> None:
        self._memory(address, width, 1, value)

    def load(self, address: int, width: int) -> int:
        self._memory(address, width, 1)
        return 0

    def poke(self, gpa: int, data: bytes) -> None:
        self.operations += 1
        if data[: max(0, MEMORY - gpa)]:
            self.code.copy(gpa, data[: MEMORY - gpa])

    def string_out(self, port: int, data: bytes, width: int) -> None:
        """Rep outs, from RAM."""
        if self._left(port, width):
            return
        units = [data[at : at + width] for at in range(0, len(data), width)]
        tame = b"".join(_tame_out(port, unit) for unit in units)
        self.code.copy(RAM, tame)
        self.code.registers(edx=port, esi=RAM, ecx=len(units))
        self.code.operate(width, 0x6E, repeat=True)
        self._count(port, len(units))

    def string_in(self, port: int, count: int, width: int) -> None:
        """Rep ins, to RAM."""
        if self._left(port, width):
            return
        self.code.registers(edx=port, edi=RAM, ecx=count)
        self.code.operate(width, 0x6C, repeat=True)
        self._count(port, count)

    def fill(self, address: int, value: int, width: int, count: int) -> None:
        """Rep stos."""
        self._memory(address, width, count, value)

    def _port(self, port: int, width: int, value: int | None = None) -> None:
        for at in range(0, width, 4):
            part = min(width, 4)
            if self._left(port, part):
                return
            self.code.registers(edx=port)
            if value is not None:
                data = (value >> 8 * at & (1 << 8 * part) - 1).to_bytes(part, "little")
                self.code.registers(eax=int.from_bytes(_tame_out(port, data), "little"))
            self.code.operate(part, 0xEC if value is None else 0xEE)
            self._count(port, 1)

    def _left(self, port: int, width: int) -> bool:
        """Leave out what KVM answers itself: timers and interrupt controllers of old."""
        used = range(port, port + width)
        kvms = any(port in used for ports in (*_KVMS, _ELCR) for port in ports)
        return kvms or used.stop > 1 << 16

    def _count(self, port: int, count: int) -> None:
        self.operations += 1
        if port not in layout.PCI_IO:  # where a doorbell may be
            self.ports += count

    def _memory(self, address: int, width: int, count: int, value: int | None = None) -> None:
        address = min(address % _TOP, _TOP - width * count)
        self.operations += 1
        if address + width * count <= MEMORY:
            return
        self.code.registers(edi=address, ecx=count)
        if value is not None:
            data = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
            value = int.from_bytes(_tame_store(address, data), "little")
            self.code.registers(eax=value)
        if count == 1:
            self.code.operate(width, 0x8A if value is None else 0x88, b"\x07")
        else:
            self.code.operate(width, 0xAA, repeat=True)
        if MEMORY <= address <= layout.PCI_MEMORY.start - width * count:
            self.mmio += count


def _tame_out(port: int, data: bytes) -> bytes:
    """Return what does not end the machine."""
    tame = bytearray(data)
    for at, byte in enumerate(data, port):
        if at == _PM1_CONTROL_HIGH:
            tame[at - port] &= ~_SLP_EN
        elif at == layout.KEYBOARD_COMMAND_PORT and byte == RESET_VALUE:
            tame[at - port] = 0
    return bytes(tame)


def _tame_store(address: int, data: bytes) -> bytes:
    """Return what makes no message that resets the vCPU, wherever the MSI-X table is.

    Its delivery modes are here, and those of both interrupt controllers.
    """
    return bytes(
        byte & ~7 if at % 8 == 1 and byte & 7 in (_SMI, _INIT) else byte
        for at, byte in enumerate(data, address)
    )


def _page_tables(at: int) -> bytes:
    """Return tables that map the first 4 GiB at their own address."""
    pointers, directories = at + PAGE, [at + PAGE * page for page in range(2, 6)]
    pages = struct.pack("<2048Q", *(page << 21 | 0x83 for page in range(2048)))
    second = struct.pack("<4Q", *(directory | 3 for directory in directories))
    return struct.pack("<Q", pointers | 3).ljust(PAGE, b"\0") + second.ljust(PAGE, b"\0") + pages


def _long(value: int) -> bytes:
    return struct.pack("<I", value)


@dataclass
class Absent:
    """The card, of which the one who writes the program knows what it offers."""

    features: int
    running: bool = False

    def set_link(self, up: bool) -> None:
        """Do nothing: nobody is there to do it."""

    def announce(self) -> None:
        """Do nothing."""


class Wild(Chaos):
    """Does what only a vCPU can, too: instructions that access a device many times."""

    def __init__(self, program: Program, features: int, seed: int) -> None:
        super().__init__(Driver(program), Absent(features), seed, MEMORY)
        self.program = program

    def actions(self) -> dict[Callable[[], None], int]:
        """Return what it does, and how often."""
        return super().actions() | {self.strings: 15}

    def strings(self) -> None:
        """Access a port, or the memory of a device, many times at once."""
        ports = (
            *(_COM1, *layout.PCI_CONFIG_PORTS, *layout.PM1_CONTROL_PORTS),
            *(self.driver.at[LEGACY_BAR] + self._rng.randrange(32), self._chance.value() & 0xFFFF),
        )
        port, width = self._rng.choice(ports), self._rng.choice((1, 2, 4))
        count = self._rng.choice((2, 3, 16, 100))
        match self._rng.randrange(3):
            case 0:
                self.program.string_out(port, self._rng.randbytes(count * width), width)
            case 1:
                self.program.string_in(port, count, width)
            case _:
                base = self.driver.at[self._rng.choice((MSIX_BAR, MODERN_BAR))]
                at = self._rng.choice((base, layout.LAPIC, layout.IOAPIC, 2 * MEMORY))
                at += self._rng.randrange(4 * PAGE)
                self.program.fill(at, self._chance.value(), self._chance.width(), count)


def finish(program: Program, features: int, rings: list[RingPlacement], end: int) -> None:
    """Be a driver that does everything right: send a frame, say END, switch off."""
    driver, code = Driver(program), program.code
    driver.come_home()
    driver.set("device_status", 0)
    program.poke(rings[0].desc, bytes(end - rings[0].desc))
    driver.accept(features)
    for queue, ring in enumerate(rings):
        driver.place(queue, ring)
    driver.set("device_status", 15)
    program.poke(end, bytes(12) + b"\xff" * 6 + b"\2" * 6 + b"\x88\xb5" + bytes(46))
    program.poke(rings[1].desc, struct.pack("<QIHH", end, 72, 0, 0))
    program.poke(rings[1].avail, struct.pack("<HHH", 1, 1, 0))
    driver.ring(1)
    code.wait_for(rings[1].used + 2, 1)
    for port in (_LCR, _MCR):
        program.out(port, 0, 1)
    for byte in END:
        program.out(_COM1, byte, 1)
    code.registers(edx=layout.PM1_CONTROL_PORTS.start, eax=_OFF)
    code.operate(2, 0xEE)
