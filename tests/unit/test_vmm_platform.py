"""Power-off and reset, as Linux asks for them."""

from __future__ import annotations

import random

import pytest

from vhostctl.vmm import acpi
from vhostctl.vmm.bus import Bus
from vhostctl.vmm.platform import Platform

STATUS, ENABLE, CONTROL, RESET = 0x600, 0x602, 0x604, 0x64


class Board:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ports = Bus("I/O port", 1 << 16)
        self.platform = Platform(
            self.ports, lambda: self.asked.append("off"), lambda: self.asked.append("reset")
        )

    def get(self, port: int) -> int:
        return int.from_bytes(self.ports.read(port, 2), "little")

    def set(self, port: int, value: int) -> None:
        self.ports.write(port, value.to_bytes(2, "little"))


@pytest.fixture
def board() -> Board:
    return Board()


def test_the_machine_is_in_acpi_mode_and_stays_so(board: Board) -> None:
    assert board.get(CONTROL) == 1
    board.set(CONTROL, 0)
    assert board.get(CONTROL) == 1


def test_s5_is_a_power_off(board: Board) -> None:
    board.set(CONTROL, acpi.SLEEP_TYPE_OFF << 10)
    assert board.asked == []
    board.set(CONTROL, acpi.SLEEP_TYPE_OFF << 10 | 1 << 13)
    assert board.asked == ["off"]
    assert board.get(CONTROL) == acpi.SLEEP_TYPE_OFF << 10 | 1
    board.set(CONTROL, 3 << 10 | 1 << 13)
    assert board.asked == ["off"]


def test_events_can_be_enabled_but_none_comes(board: Board) -> None:
    board.set(STATUS, 0xFFFF)
    board.set(ENABLE, 0x0120)
    assert board.get(STATUS) == 0
    assert board.get(ENABLE) == 0x0120


def test_the_keyboard_controller_resets(board: Board) -> None:
    assert board.ports.read(RESET, 1) == b"\0"
    board.ports.write(RESET, b"\xd1")
    assert board.asked == []
    board.ports.write(RESET, bytes((acpi.RESET_VALUE,)))
    assert board.asked == ["reset"]


def test_another_board_goes_on_from_the_state(board: Board) -> None:
    board.set(ENABLE, 0x0100)
    board.set(CONTROL, 0x1C02)
    other = Board()
    other.platform.restore(board.platform.state())
    assert (other.get(ENABLE), other.get(CONTROL)) == (0x0100, 0x1C03)


def test_no_write_is_too_odd(board: Board) -> None:
    chance = random.Random(1)  # noqa: S311
    for _ in range(20_000):
        at = chance.choice((*range(0x600, 0x606), RESET))
        length = chance.choice((1, 2, 4))
        board.ports.write(at, chance.randbytes(length))
        assert len(board.ports.read(at, length)) == length
    assert set(board.asked) == {"off", "reset"}
