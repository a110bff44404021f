"""The commands on devices, and the events they lead to: names, arguments, results."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

import msgspec

from vhostctl.control.snapshot import Snapshot
from vhostctl.service.schema import Command, Nothing
from vhostctl.service.spec import DeviceSpec, DeviceStatus, Mtu

_Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Positive = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
_Microseconds = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class Devices(Protocol):
    """What the commands need: service/manager.py. It raises VhostctlError."""

    def add(self, spec: DeviceSpec, start: bool = True) -> bool:
        """Add a device; False: that very device is there. Another of its name is refused."""

    def remove(self, name: str) -> bool:
        """Take a device down; False: it is not there."""

    def start(self, name: str) -> bool:
        """Wire it; False: it is."""

    def stop(self, name: str) -> bool:
        """Take its wiring down; False: it has none."""

    def set_link(self, name: str, up: bool) -> bool:
        """Take its link up or down; False: it is."""

    def set_pairs(self, name: str, pairs: int) -> int:
        """Enable the first `pairs` and no others; return the frames dropped."""

    def set_mtu(self, name: str, mtu: int) -> bool:
        """Change the MTU of its tap; False: it is that."""

    def add_memory(self, name: str, region: str, size: int, gpa: int | None) -> int:
        """Add a region of `size` bytes and return its gpa."""

    def remove_memory(self, name: str, region: str) -> None:
        """Remove a region."""

    def start_log(self, name: str) -> None:
        """Log what the device writes."""

    def sync_log(self, name: str) -> list[tuple[int, int]]:
        """Return (gpa, bytes) of what was written since the last call."""

    def stop_log(self, name: str) -> list[tuple[int, int]]:
        """Return the last of it, and log no longer."""

    def set_busyloop(self, name: str, microseconds: int) -> None:
        """Let the workers poll for so long."""

    def suspend(self, name: str) -> dict[str, object]:
        """Stop and return the Snapshot as JSON data."""

    def resume(self, name: str) -> None:
        """Go on from there."""

    def query(self, name: str | None = None) -> list[DeviceStatus]:
        """Return what every device is, or the one called `name`."""


class AddDevice(DeviceSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """A device, and whether its rings start at once."""

    start: bool = True

    def spec(self) -> DeviceSpec:
        """Return the device alone."""
        return DeviceSpec(**{key: getattr(self, key) for key in DeviceSpec.__struct_fields__})


class OfDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which device."""

    name: str


class SetLink(OfDevice, frozen=True):
    """Which device, and whether its link is up."""

    up: bool


class SetPairs(OfDevice, frozen=True):
    """Which device, and how many of its pairs take part: the first ones."""

    pairs: _Positive


class SetMtu(OfDevice, frozen=True):
    """Which device, and the bytes of its tap's MTU."""

    mtu: Mtu


class AddMemory(OfDevice, frozen=True):
    """Which device, the region's name, bytes, and its guest physical address if it matters."""

    region: str
    size: _Positive
    gpa: _Natural | None = None


class RemoveMemory(OfDevice, frozen=True):
    """Which device, and the region's name."""

    region: str


class SetBusyloop(OfDevice, frozen=True):
    """Which device, and for how long its workers poll before they sleep; 0: not at all."""

    microseconds: _Microseconds


class Changed(msgspec.Struct, frozen=True):
    """Whether there was anything to change."""

    changed: bool


class Dropped(msgspec.Struct, frozen=True):
    """Frames that were lost over it."""

    dropped: int


class Placed(msgspec.Struct, frozen=True):
    """Where a region lies: a guest physical address."""

    gpa: int


class DirtyRange(msgspec.Struct, frozen=True):
    """Guest memory that the devices wrote: guest physical address and bytes, whole pages."""

    gpa: int
    size: int


class Dirty(msgspec.Struct, frozen=True):
    """What the devices wrote since the last answer."""

    ranges: list[DirtyRange]


def device_commands(devices: Devices) -> list[Command[Any]]:
    """Return the commands on `devices`, in the order in which they are listed."""
    return [
        Command(
            "device-add",
            "Wire a tap to vhost-net; a device that is there as described stays as it is.",
            AddDevice,
            Changed,
            lambda a: Changed(devices.add(a.spec(), a.start)),
        ),
        Command(
            "device-del",
            "Take a device down and forget it, if it is there.",
            OfDevice,
            Changed,
            lambda a: Changed(devices.remove(a.name)),
        ),
        Command(
            "device-start",
            "Wire a device that is stopped or has failed.",
            OfDevice,
            Changed,
            lambda a: Changed(devices.start(a.name)),
        ),
        Command(
            "device-stop",
            "Take the wiring of a device down, and keep the device.",
            OfDevice,
            Changed,
            lambda a: Changed(devices.stop(a.name)),
        ),
        Command(
            "query-devices",
            "Say what every device is.",
            Nothing,
            list[DeviceStatus],
            lambda _: devices.query(),
        ),
        Command(
            "query-device",
            "Say what one device is.",
            OfDevice,
            DeviceStatus,
            lambda a: devices.query(a.name)[0],
        ),
        *_change_commands(devices),
        *_move_commands(devices),
    ]


def _change_commands(devices: Devices) -> list[Command[Any]]:
    """What is changed while the rings run."""
    return [
        Command(
            "set-link",
            "Take the link up, or down: frames wait where they are.",
            SetLink,
            Changed,
            lambda a: Changed(devices.set_link(a.name, a.up)),
        ),
        Command(
            "set-pairs",
            "Let this many queue pairs take part, the first ones, as a guest's MQ command does.",
            SetPairs,
            Dropped,
            lambda a: Dropped(devices.set_pairs(a.name, a.pairs)),
        ),
        Command(
            "set-mtu",
            "Change the tap's MTU while frames flow, up to that with which the device started.",
            SetMtu,
            Changed,
            lambda a: Changed(devices.set_mtu(a.name, a.mtu)),
        ),
        Command(
            "memory-add",
            "Add fresh memory to the guest's, behind all other unless gpa says where.",
            AddMemory,
            Placed,
            lambda a: Placed(devices.add_memory(a.name, a.region, a.size, a.gpa)),
        ),
        Command(
            "memory-del",
            "Take a region of memory away.",
            RemoveMemory,
            Nothing,
            lambda a: devices.remove_memory(a.name, a.region),
        ),
        Command(
            "busyloop-set",
            "Set for how long the workers poll before they sleep; 0: not at all.",
            SetBusyloop,
            Nothing,
            lambda a: devices.set_busyloop(a.name, a.microseconds),
        ),
    ]


def _move_commands(devices: Devices) -> list[Command[Any]]:
    """What it takes to go on somewhere else."""
    return [
        Command(
            "log-start",
            "Log which memory the device writes.",
            OfDevice,
            Nothing,
            lambda a: devices.start_log(a.name),
        ),
        Command(
            "log-sync",
            "Say what was written since the last answer.",
            OfDevice,
            Dirty,
            lambda a: _dirty(devices.sync_log(a.name)),
        ),
        Command(
            "log-stop",
            "Log no longer, and say what was written since the last answer.",
            OfDevice,
            Dirty,
            lambda a: _dirty(devices.stop_log(a.name)),
        ),
        Command(
            "suspend",
            "Stop the rings and return a document from which another session can go on.",
            OfDevice,
            Snapshot,
            lambda a: devices.suspend(a.name),
        ),
        Command(
            "resume",
            "Go on where the device was suspended.",
            OfDevice,
            Nothing,
            lambda a: devices.resume(a.name),
        ),
    ]


def _dirty(ranges: list[tuple[int, int]]) -> Dirty:
    return Dirty([DirtyRange(gpa, size) for gpa, size in ranges])
