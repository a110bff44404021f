"""The registers of a modern virtio-pci device, in a memory BAR: virtio 1.2, section 4.1.4."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from vhostctl.abi import virtio_pci as abi
from vhostctl.abi.virtio_pci import virtio_pci_common_cfg as common
from vhostctl.vmm.bus import Bus, BusDevice
from vhostctl.vmm.registers import Register, Registers
from vhostctl.vmm.virtio import VirtioDevice
from vhostctl.vmm.virtio_transport import VirtioTransport

NOTIFY_MULTIPLIER = 4
"""Bytes from one virtqueue's doorbell to the next one's."""

_PAGE = 4096
_COMMON_SIZE = ctypes.sizeof(common)
MAX_QUEUES = _PAGE // NOTIFY_MULTIPLIER


@dataclass(frozen=True, slots=True)
class Area:
    """A structure in the BAR: VIRTIO_PCI_CAP_*, and the bytes that a capability tells of."""

    kind: int
    offset: int
    length: int


class ModernBar(Bus):
    """The memory BAR: each structure on a page of its own."""

    def __init__(self, transport: VirtioTransport) -> None:
        """Show `transport`, whose device has at most MAX_QUEUES virtqueues."""
        super().__init__("virtio BAR", 4 * _PAGE)
        queues = len(transport.state.queues)
        isr = Registers([Register(0, 1, transport.events.read_isr)])
        structures: list[tuple[int, BusDevice, int]] = [
            (abi.VIRTIO_PCI_CAP_COMMON_CFG, _common(transport), _COMMON_SIZE),
            (abi.VIRTIO_PCI_CAP_ISR_CFG, isr, 1),
            (abi.VIRTIO_PCI_CAP_DEVICE_CFG, _Config(transport.device), _PAGE),
            (abi.VIRTIO_PCI_CAP_NOTIFY_CFG, _Notify(transport), NOTIFY_MULTIPLIER * queues),
        ]
        self.areas: list[Area] = []
        for page, (kind, device, length) in enumerate(structures):
            self.add(page * _PAGE, _PAGE, device)
            self.areas.append(Area(kind, page * _PAGE, length))

    def doorbell(self, queue: int) -> int:
        """Return the offset of a virtqueue's doorbell."""
        return self.areas[-1].offset + NOTIFY_MULTIPLIER * queue


class _Config:
    """The device's own configuration, as a BusDevice."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device

    def read(self, offset: int, length: int) -> bytes:
        return self._device.read_config(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self._device.write_config(offset, data)


class _Notify:
    """The doorbells that KVM does not answer; what is written does not matter."""

    def __init__(self, transport: VirtioTransport) -> None:
        self._transport = transport

    def read(self, offset: int, length: int) -> bytes:  # noqa: ARG002 -- nothing to read
        return bytes(length)

    def write(self, offset: int, data: bytes) -> None:  # noqa: ARG002 -- where is enough
        self._transport.ring(offset // NOTIFY_MULTIPLIER)


def _common(transport: VirtioTransport) -> Registers:
    events = transport.events

    def offered() -> int:
        return transport.offered(transport.state.device_feature_select)

    def acknowledged() -> int:
        return transport.acknowledged(transport.state.driver_feature_select)

    def acknowledge(bits: int) -> None:
        transport.acknowledge(transport.state.driver_feature_select, bits)

    def enabled() -> int:
        return transport.selected is not None and transport.selected.enabled

    def enable(value: int) -> None:
        queue = transport.settable
        if queue is not None and value == 1:
            queue.enabled = True

    def notify_offset() -> int:
        return 0 if transport.selected is None else transport.state.queue_select

    return Registers(
        (
            _state(transport, "device_feature_select"),
            _register("device_feature", offered),
            _state(transport, "driver_feature_select", field="guest_feature_select"),
            _register("guest_feature", acknowledged, acknowledge),
            _register(
                "msix_config",
                lambda: events.vectors[events.config],
                lambda vector: events.assign(events.config, vector),
            ),
            _register("num_queues", lambda: len(transport.state.queues)),
            _register("device_status", lambda: transport.state.status, transport.set_status),
            _register("config_generation", lambda: transport.state.generation),
            _state(transport, "queue_select"),
            _register("queue_size", transport.selected_size, transport.set_size),
            _register("queue_msix_vector", transport.vector, transport.set_vector),
            _register("queue_enable", enabled, enable),
            _register("queue_notify_off", notify_offset),
            _address(transport, "desc"),
            _address(transport, "avail"),
            _address(transport, "used"),
        )
    )


def _register(
    field: str, read: Callable[[], int], write: Callable[[int], None] | None = None
) -> Register:
    place = getattr(common, field)
    return Register(place.offset, place.size, read, write)


def _state(transport: VirtioTransport, name: str, field: str = "") -> Register:
    def read() -> int:
        return int(getattr(transport.state, name))

    def write(value: int) -> None:
        setattr(transport.state, name, value)

    return _register(field or name, read, write)


def _address(transport: VirtioTransport, part: str) -> Register:
    """Return the register of an address: 64 bits, of which drivers write half at a time."""

    def read() -> int:
        return 0 if transport.selected is None else int(getattr(transport.selected, part))

    def write(value: int) -> None:
        queue = transport.settable
        if queue is not None:
            setattr(queue, part, value)

    return Register(getattr(common, f"queue_{part}_lo").offset, 8, read, write)
