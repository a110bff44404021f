"""The serial port: what a 16550 driver sees of it."""

from __future__ import annotations

import random

import pytest

from vhostctl.vmm.serial import Serial

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
DLAB, LOOP = 0x80, 0x10


class Port:
    """A port with what it did to the world, and registers one at a time."""

    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.output = b""
        self.serial = Serial(self.levels.append, self._out)

    def _out(self, data: bytes) -> None:
        self.output += data

    def line(self) -> bool:
        return bool(self.levels) and self.levels[-1]

    def get(self, at: int) -> int:
        return self.serial.read(at, 1)[0]

    def set(self, at: int, value: int) -> None:
        self.serial.write(at, bytes((value,)))


@pytest.fixture
def port() -> Port:
    return Port()


def test_what_is_sent_is_out_at_once(port: Port) -> None:
    port.serial.write(DATA, b"h")
    port.serial.write(DATA, b"i")
    assert port.output == b"hi"
    assert port.get(LSR) == 0x60
    assert not port.levels


def test_a_driver_finds_a_16550a(port: Port) -> None:
    assert port.get(IIR) == 0x01
    port.set(FCR, 0x01)
    assert port.get(IIR) == 0xC1
    port.set(IER, 0xFF)
    assert port.get(IER) == 0x0F
    port.set(SCR, 0xA5)
    assert port.get(SCR) == 0xA5
    port.set(MCR, LOOP | 0x0A)
    assert port.get(MSR) & 0xF0 == 0x90


def test_the_divisor_hides_behind_its_latch(port: Port) -> None:
    port.set(LCR, DLAB | 3)
    port.set(DATA, 0x34)
    port.set(IER, 0x12)
    assert port.serial.read(0, 2) == b"\x34\x12"
    port.set(LCR, 3)
    assert port.output == b""
    assert port.get(IER) == 0


def test_the_line_is_up_while_something_waits(port: Port) -> None:
    port.serial.input(b"ab")
    assert not port.line()
    port.set(IER, 0x01)
    assert port.line()
    assert port.get(IIR) == 0x04
    assert port.get(LSR) & 1
    assert port.get(DATA) == ord("a")
    assert port.line()
    assert port.get(DATA) == ord("b")
    assert not port.line()
    assert port.get(IIR) == 0x01
    assert port.get(DATA) == 0
    assert port.levels == [True, False]


def test_an_empty_transmitter_interrupts_once(port: Port) -> None:
    port.set(IER, 0x02)
    assert port.line()
    assert port.get(IIR) == 0x02
    assert not port.line()
    port.set(DATA, ord("x"))
    assert port.line()
    assert port.get(IIR) == 0x02
    port.set(IER, 0x00)
    port.set(IER, 0x02)
    assert port.line()


def test_clearing_the_fifo_drops_what_a_fifo_holds(port: Port) -> None:
    port.serial.input(bytes(range(20)))
    port.set(FCR, 0x03)
    assert [port.get(DATA) for _ in range(4)] == [16, 17, 18, 19]


def test_loopback_ends_in_an_overrun(port: Port) -> None:
    port.set(IER, 0x05)
    port.set(MCR, LOOP)
    for value in range(100):
        port.set(DATA, value)
    assert port.output == b""
    assert port.get(IIR) == 0x06
    assert port.get(LSR) == 0x63
    assert port.get(LSR) == 0x61
    assert [port.get(DATA) for _ in range(17)] == [*range(16), 0]
    assert not port.line()


def test_another_port_goes_on_from_the_state(port: Port) -> None:
    port.set(LCR, DLAB)
    port.set(DATA, 1)
    port.set(LCR, 3)
    port.set(IER, 0x03)
    port.set(FCR, 0x01)
    port.set(MCR, 0x0B)
    port.set(SCR, 9)
    port.serial.input(b"z")
    other = Port()
    other.serial.restore(port.serial.state())
    assert other.serial.state() == port.serial.state()
    assert other.levels == [True]
    assert other.serial.read(0, 8) == port.serial.read(0, 8)


def test_no_write_is_too_odd(port: Port) -> None:
    chance = random.Random(1)  # noqa: S311
    for _ in range(20_000):
        at = chance.randrange(8)
        length = chance.randint(1, 8 - at)
        if chance.random() < 0.5:
            port.serial.write(at, chance.randbytes(length))
        else:
            assert len(port.serial.read(at, length)) == length
    assert len(port.serial.state().received) <= 16
    assert all(one != other for one, other in zip(port.levels, port.levels[1:], strict=False))
