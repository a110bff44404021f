"""The few ports of a PC's board that Linux uses: power-off and reset.

There is no CMOS clock and no PM timer: a guest of KVM has kvm-clock.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from vhostctl.vmm import layout
from vhostctl.vmm.acpi import RESET_VALUE, SLEEP_TYPE_OFF
from vhostctl.vmm.bus import Bus
from vhostctl.vmm.registers import U16

_SCI_EN = 1 << 0
_SLP_TYP = 0x1C00
_SLP_TYP_SHIFT = 10
_SLP_EN = 1 << 13


class PlatformState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PM1_EN and PM1_CNT; the rest never changes."""

    enable: U16
    control: U16


class Platform:
    """The board: ACPI's PM1 registers, and the keyboard controller as far as it resets.

    `on_power_off` and `on_reset` are called when the guest asks for it, which it may do
    again before its vCPUs stand still.
    """

    def __init__(
        self, ports: Bus, on_power_off: Callable[[], None], on_reset: Callable[[], None]
    ) -> None:
        """Answer on the I/O ports `ports`. Raises InvalidArgument if somebody does already."""
        self._power = PowerManagement(on_power_off)
        pm1 = range(layout.PM1_EVENT_PORTS.start, layout.PM1_CONTROL_PORTS.stop)
        ports.add(pm1.start, len(pm1), self._power)
        ports.add(layout.KEYBOARD_COMMAND_PORT, 1, ResetPort(on_reset))

    def state(self) -> PlatformState:
        """Return what `restore` needs to go on from here."""
        return PlatformState(enable=self._power.enable, control=self._power.control)

    def restore(self, state: PlatformState) -> None:
        """Be as `state` says."""
        self._power.enable, self._power.control = state.enable, state.control


class PowerManagement:
    """ACPI's PM1_STS, PM1_EN and PM1_CNT (ACPI 6.4, 4.8.3), each of two bytes; a BusDevice.

    No event ever comes, so PM1_STS stays 0.
    """

    def __init__(self, on_power_off: Callable[[], None]) -> None:
        self._on_power_off = on_power_off
        self.enable = 0
        self.control = _SCI_EN

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes of the registers from `offset` on."""
        return self._registers()[offset : offset + length]

    def write(self, offset: int, data: bytes) -> None:
        """Write the registers from `offset` on; SLP_EN with S5's SLP_TYP is a power-off."""
        new = bytearray(self._registers())
        new[offset : offset + len(data)] = data
        self.enable = int.from_bytes(new[2:4], "little")
        control = int.from_bytes(new[4:6], "little")
        self.control = control & ~_SLP_EN | _SCI_EN
        if control & _SLP_EN and (control & _SLP_TYP) >> _SLP_TYP_SHIFT == SLEEP_TYPE_OFF:
            self._on_power_off()

    def _registers(self) -> bytes:
        registers = (0, self.enable, self.control)
        return b"".join(register.to_bytes(2, "little") for register in registers)


class ResetPort:
    """The keyboard controller's command port, without a keyboard; a BusDevice of one port."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def read(self, offset: int, length: int) -> bytes:  # noqa: ARG002 -- one port
        """Read the status: neither buffer is full, so Linux need not wait before a command."""
        return bytes(length)

    def write(self, offset: int, data: bytes) -> None:  # noqa: ARG002 -- one port
        """Take a command; the pulse on the reset line is the one that is known."""
        if data[0] == RESET_VALUE:
            self._on_reset()
