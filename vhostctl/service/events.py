"""The events of the service: their names, and what each one tells."""

from __future__ import annotations

from typing import Literal

import msgspec


class _OfDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which device."""

    device: str


class DeviceAdded(_OfDevice, frozen=True):
    """A device was added."""


class DeviceDeleted(_OfDevice, frozen=True):
    """A device was taken down and forgotten."""


class DeviceState(_OfDevice, frozen=True):
    """A device is in another state."""

    state: Literal["running", "stopped", "suspended", "failed"]


class LinkChanged(_OfDevice, frozen=True):
    """A link went up or down."""

    up: bool


class PairsChanged(_OfDevice, frozen=True):
    """Other queue pairs take part: how many."""

    pairs: int


class MemoryChanged(_OfDevice, frozen=True):
    """A region of guest memory came or went."""

    region: str


class RingError(_OfDevice, frozen=True):
    """A ring was found malformed, `count` times since the last event."""

    queue: int
    count: int


class GuestFailed(_OfDevice, frozen=True):
    """The guest behind a device ended with an error."""

    error: str


class Shutdown(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The service ends, on `quit` or by a signal; never because of a guest."""

    guest: bool
    reason: Literal["host-qmp-quit", "host-signal"]


EVENTS: dict[str, type[msgspec.Struct]] = {
    "DEVICE_ADDED": DeviceAdded,
    "DEVICE_DELETED": DeviceDeleted,
    "DEVICE_STATE": DeviceState,
    "LINK_CHANGED": LinkChanged,
    "PAIRS_CHANGED": PairsChanged,
    "MEMORY_CHANGED": MemoryChanged,
    "RING_ERROR": RingError,
    "GUEST_FAILED": GuestFailed,
    "SHUTDOWN": Shutdown,
}
