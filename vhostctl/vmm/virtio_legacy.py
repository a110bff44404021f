"""The registers of a legacy virtio-pci device, in an I/O BAR: virtio 1.2, section 4.1.4.10."""

from __future__ import annotations

from vhostctl.abi import virtio
from vhostctl.abi import virtio_pci as abi
from vhostctl.vmm.registers import Register, Registers
from vhostctl.vmm.virtio_transport import VirtioTransport

SIZE = 128
"""Bytes of the BAR: the registers, and as much of the device's configuration as fits."""

_WITHOUT_MSIX = 20  # VIRTIO_PCI_CONFIG_OFF(): where the device's configuration begins
_WITH_MSIX = 24
_LAST_PAGE = 0xFFFF_FFFF


class LegacyBar:
    """The I/O BAR, a BusDevice: with MSI-X on, two more registers shift what is behind them."""

    def __init__(self, transport: VirtioTransport) -> None:
        """Show `transport`."""
        self._transport = transport
        self._registers = _registers(transport)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`."""
        ahead = self._ahead(offset, length)
        data = self._registers.read(offset, ahead)
        if ahead < length:
            config = offset + ahead - self._config
            data += self._transport.device.read_config(config, length - ahead)
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""
        ahead = self._ahead(offset, len(data))
        self._registers.write(offset, data[:ahead])
        if ahead < len(data):
            config = offset + ahead - self._config
            self._transport.device.write_config(config, data[ahead:])

    @property
    def _config(self) -> int:
        return _WITH_MSIX if self._transport.events.msix.enabled else _WITHOUT_MSIX

    def _ahead(self, offset: int, length: int) -> int:
        """Return how many of `length` bytes at `offset` lie ahead of the configuration."""
        return max(0, min(length, self._config - offset))


def _registers(transport: VirtioTransport) -> Registers:
    events = transport.events

    def page() -> int:
        queue = transport.selected
        enabled = queue is not None and queue.enabled
        # A modern driver may have placed it where a legacy one cannot.
        number = queue.desc >> abi.VIRTIO_PCI_QUEUE_ADDR_SHIFT if queue and enabled else 0
        return number & _LAST_PAGE

    def set_page(number: int) -> None:
        queue = transport.selected
        if queue is None or transport.state.status & virtio.VIRTIO_CONFIG_S_DRIVER_OK:
            return
        queue.enabled = bool(number)
        if not number:
            return
        queue.size = transport.selected_size()
        queue.desc = number << abi.VIRTIO_PCI_QUEUE_ADDR_SHIFT
        queue.avail = queue.desc + virtio.vring_desc_size(queue.size)
        end = queue.avail + virtio.vring_avail_size(queue.size, event_idx=True)
        queue.used = -(-end // abi.VIRTIO_PCI_VRING_ALIGN) * abi.VIRTIO_PCI_VRING_ALIGN

    def select(number: int) -> None:
        transport.state.queue_select = number

    return Registers(
        (
            Register(abi.VIRTIO_PCI_HOST_FEATURES, 4, lambda: transport.offered(0)),
            Register(
                abi.VIRTIO_PCI_GUEST_FEATURES,
                4,
                lambda: transport.acknowledged(0),
                transport.acknowledge_legacy,
            ),
            Register(abi.VIRTIO_PCI_QUEUE_PFN, 4, page, set_page),
            Register(abi.VIRTIO_PCI_QUEUE_NUM, 2, transport.selected_size),
            Register(abi.VIRTIO_PCI_QUEUE_SEL, 2, lambda: transport.state.queue_select, select),
            Register(abi.VIRTIO_PCI_QUEUE_NOTIFY, 2, lambda: 0, transport.ring),
            Register(
                abi.VIRTIO_PCI_STATUS, 1, lambda: transport.state.status, transport.set_status
            ),
            Register(abi.VIRTIO_PCI_ISR, 1, events.read_isr),
            Register(
                abi.VIRTIO_MSI_CONFIG_VECTOR,
                2,
                lambda: events.vectors[events.config],
                lambda vector: events.assign(events.config, vector),
            ),
            Register(abi.VIRTIO_MSI_QUEUE_VECTOR, 2, transport.vector, transport.set_vector),
        )
    )
