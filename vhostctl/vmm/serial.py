"""A 16550A serial port whose line is never busy.

What is sent is out at once, so the transmitter is always empty. Registers and bits are
those of the National Semiconductor PC16550D datasheet and of ``linux/serial_reg.h``.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from vhostctl.vmm.registers import U8, U16

_FIFO_SIZE = 16

_IER_RECEIVED = 0x01
_IER_SENT = 0x02
_IER_LINE = 0x04
_IER_BITS = 0x0F

_IIR_NONE = 0x01
_IIR_SENT = 0x02
_IIR_RECEIVED = 0x04
_IIR_LINE = 0x06
_IIR_FIFOS = 0xC0

_FCR_ENABLE = 0x01
_FCR_CLEAR_RECEIVED = 0x02
_LCR_DLAB = 0x80
_MCR_BITS = 0x1F
_MCR_LOOP = 0x10
_LSR_READY = 0x01
_LSR_OVERRUN = 0x02
_LSR_EMPTY = 0x60  # holding register and transmitter
_MSR_CONNECTED = 0xB0  # clear to send, data set ready, carrier detect
_NO_REGISTER = 0xFF


class _At:
    """Register offsets; DATA and IER are the divisor's bytes while LCR_DLAB is set."""

    DATA = 0
    IER = 1
    IIR = 2  # read
    FCR = 2  # written
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCR = 7


class SerialState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a port remembers: its registers, and what the guest has not read yet."""

    ier: U8
    fcr: U8
    lcr: U8
    mcr: U8
    scr: U8
    divisor: U16
    overrun: bool
    sent: bool
    received: bytes


class Serial:
    """A 16550A with FIFOs; a BusDevice of 8 ports.

    `irq` is called with the level of the interrupt line when it changes; `output` with each
    byte that the guest sends, and `drained` when it has read the last of what waited. Received
    bytes wait here without a bound, for `input` is the VMM's own; those that a guest sends
    itself in loopback end in an overrun, as in hardware.
    """

    def __init__(self, irq: Callable[[bool], None], output: Callable[[bytes], object]) -> None:
        self._irq = irq
        self._output = output
        self.drained: Callable[[], None] | None = None
        self._level = False
        self._received = bytearray()
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
        self._divisor = 12  # 9600 baud
        self._overrun = False
        self._sent = False

    def input(self, data: bytes) -> None:
        """Receive `data`: the guest reads it when it comes to it."""
        self._received += data
        self._update()

    @property
    def waiting(self) -> int:
        """How many bytes the guest has not read yet."""
        return len(self._received)

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` registers from `offset` on."""
        return bytes(self._read(at) for at in range(offset, offset + length))

    def write(self, offset: int, data: bytes) -> None:
        """Write registers from `offset` on."""
        for at, value in enumerate(data, offset):
            if at == _At.DATA and not self._lcr & _LCR_DLAB:
                self._send(value)
            else:
                self._write(at, value)

    def state(self) -> SerialState:
        """Return what `restore` needs to go on from here."""
        return SerialState(
            ier=self._ier,
            fcr=self._fcr,
            lcr=self._lcr,
            mcr=self._mcr,
            scr=self._scr,
            divisor=self._divisor,
            overrun=self._overrun,
            sent=self._sent,
            received=bytes(self._received),
        )

    def restore(self, state: SerialState) -> None:
        """Be as `state` says and drive the line; a driver takes one interrupt too many."""
        self._ier, self._fcr, self._lcr = state.ier, state.fcr, state.lcr
        self._mcr, self._scr, self._divisor = state.mcr, state.scr, state.divisor
        self._overrun, self._sent = state.overrun, state.sent
        self._received = bytearray(state.received)
        self._update()

    def _send(self, value: int) -> None:
        if self._mcr & _MCR_LOOP:
            self._loop_back(value)
        else:
            self._output(bytes((value,)))
        self._sent = True
        if self._ier:
            self._update()

    def _loop_back(self, value: int) -> None:
        if len(self._received) < _FIFO_SIZE:
            self._received.append(value)
        else:
            self._overrun = True

    def _read(self, at: int) -> int:
        match at:
            case _At.DATA | _At.IER if self._lcr & _LCR_DLAB:
                return self._divisor >> 8 * at & 0xFF
            case _At.DATA:
                return self._receive()
            case _At.IER:
                return self._ier
            case _At.IIR:
                return self._identify()
            case _At.LCR:
                return self._lcr
            case _At.MCR:
                return self._mcr
            case _At.LSR:
                return self._line_status()
            case _At.MSR:
                return self._modem_status()
            case _At.SCR:
                return self._scr
        return _NO_REGISTER

    def _write(self, at: int, value: int) -> None:
        match at:
            case _At.DATA:
                self._divisor = self._divisor & 0xFF00 | value
            case _At.IER if self._lcr & _LCR_DLAB:
                self._divisor = self._divisor & 0x00FF | value << 8
            case _At.IER:
                if value & ~self._ier & _IER_SENT:
                    self._sent = True
                self._ier = value & _IER_BITS
            case _At.FCR:
                if value & _FCR_CLEAR_RECEIVED and self._received:
                    del self._received[:_FIFO_SIZE]
                    self._taken()
                self._fcr = value & _FCR_ENABLE
            case _At.LCR:
                self._lcr = value
            case _At.MCR:
                self._mcr = value & _MCR_BITS
            case _At.SCR:
                self._scr = value
        self._update()

    def _receive(self) -> int:
        if not self._received:
            return 0
        value = self._received.pop(0)
        self._taken()
        return value

    def _taken(self) -> None:
        if not self._received:
            self._update()
            if self.drained is not None:
                self.drained()

    def _cause(self) -> int:
        if self._overrun and self._ier & _IER_LINE:
            return _IIR_LINE
        if self._received and self._ier & _IER_RECEIVED:
            return _IIR_RECEIVED
        if self._sent and self._ier & _IER_SENT:
            return _IIR_SENT
        return _IIR_NONE

    def _identify(self) -> int:
        cause = self._cause()
        if cause == _IIR_SENT:
            self._sent = False
            self._update()
        return cause | (_IIR_FIFOS if self._fcr else 0)

    def _line_status(self) -> int:
        status = _LSR_EMPTY
        if self._received:
            status |= _LSR_READY
        if self._overrun:
            status |= _LSR_OVERRUN
            self._overrun = False
            self._update()
        return status

    def _modem_status(self) -> int:
        if not self._mcr & _MCR_LOOP:
            return _MSR_CONNECTED
        # Each output comes back as an input: RTS as CTS, DTR as DSR, OUT1 as RI, OUT2 as DCD.
        mcr = self._mcr
        return (mcr & 0x02) << 3 | (mcr & 0x01) << 5 | (mcr & 0x0C) << 4

    def _update(self) -> None:
        level = self._cause() != _IIR_NONE
        if level != self._level:
            self._level = level
            self._irq(level)
