"""What a driver is given and what it tells: plain data, and Protocols for who has it already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class GuestMemory(Protocol):
    """Guest memory as this process maps it."""

    def hva(self, gpa: int, length: int) -> int:
        """Return the host virtual address of [gpa, gpa + length); raise if it is outside."""


class Queue(Protocol):
    """Where one ring is and which eventfds it rings; `QueueConfig` is the plain one."""

    @property
    def size(self) -> int:
        """Descriptors."""

    @property
    def desc(self) -> int:
        """Guest physical address of the descriptor table, on 16 bytes."""

    @property
    def avail(self) -> int:
        """Guest physical address of the avail ring, on 2 bytes."""

    @property
    def used(self) -> int:
        """Guest physical address of the used ring, on 4 bytes."""

    @property
    def kick(self) -> int:
        """Eventfd that the driver signals."""

    @property
    def call(self) -> int:
        """Eventfd that the device signals."""

    @property
    def base(self) -> int:
        """Where both indices start, as in VHOST_SET_VRING_BASE."""


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """One ring: `size` descriptors, guest physical addresses, borrowed eventfd numbers.

    `base` is where both ring indices start, 0..65535.
    """

    size: int
    desc: int
    avail: int
    used: int
    kick: int
    call: int
    base: int = 0


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Counters of a pair since it was made; bytes are those of frames, without vnet headers.

    `kicks` and `calls` are eventfd signals sent and seen, `errors` frames dropped and
    faults, `rx_posted` chains and `tx_in_flight` frames that the device has, and
    `tx_completed` frames that it gave back.
    """

    rx_frames: int
    rx_bytes: int
    rx_kicks: int
    rx_calls: int
    rx_errors: int
    rx_posted: int
    tx_frames: int
    tx_bytes: int
    tx_kicks: int
    tx_calls: int
    tx_errors: int
    tx_in_flight: int
    tx_completed: int
