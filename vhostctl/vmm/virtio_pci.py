"""A virtio device on the PCI bus, modern or transitional: virtio 1.2, section 4.1."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec

from vhostctl.abi import pci
from vhostctl.abi import virtio_pci as abi
from vhostctl.abi.virtio import VIRTIO_F_VERSION_1
from vhostctl.errors import InvalidArgument, VhostctlError
from vhostctl.host.closing import Closing
from vhostctl.vmm.doorbells import Doorbell, Doorbells
from vhostctl.vmm.interrupts import Interrupts
from vhostctl.vmm.log import log
from vhostctl.vmm.notifiers import Watcher
from vhostctl.vmm.pcifunction import Bar, Capability, PciFunction, PciIds, PciState
from vhostctl.vmm.virtio import Ring, VirtioDevice
from vhostctl.vmm.virtio_events import Events, EventsState
from vhostctl.vmm.virtio_legacy import SIZE as LEGACY_SIZE
from vhostctl.vmm.virtio_legacy import LegacyBar
from vhostctl.vmm.virtio_modern import MAX_QUEUES, NOTIFY_MULTIPLIER, Area, ModernBar
from vhostctl.vmm.virtio_transport import DriverState, VirtioTransport

LEGACY_BAR = 0
MSIX_BAR = 1
MODERN_BAR = 4

_VENDOR = 0x1AF4
_MODERN_ID = 0x1040
_TRANSITIONAL_IDS = {1: 0x1000, 2: 0x1001, 3: 0x1003, 4: 0x1005, 5: 0x1002, 8: 0x1004, 9: 0x1009}
_NETWORK = 1
_NETWORK_CLASS = 0x02_00_00
_OTHER_CLASS = 0xFF_00_00

_CFG_ACCESS = struct.Struct("<2xB3xII4s")  # as _capability() has it: what the guest writes
_CFG_DATA = 14


class VirtioPciState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function and its transport; what the device itself has to keep is not in it."""

    config: PciState
    driver: DriverState
    events: EventsState


class VirtioPci(PciFunction, Closing):
    """A PCI function that is the transport of `device`: put it on a bus with `PciBus.add`.

    A modern driver works in a memory BAR; a `transitional` device has an I/O BAR for legacy
    ones too. While the device runs, KVM has an ioeventfd for each virtqueue with a kick.
    All calls are under the machine's lock.
    """

    def __init__(
        self,
        device: VirtioDevice,
        interrupts: Interrupts,
        doorbells: Doorbells,
        loop: Watcher,
        *,
        transitional: bool = True,
        ioeventfd: bool = True,
    ) -> None:
        """Attach to `device`. Without `ioeventfd` every doorbell is answered by this process.

        Raises InvalidArgument for a device that cannot be transitional, or has too many
        virtqueues, and KernelError.
        """
        if len(device.calls) > MAX_QUEUES:
            raise InvalidArgument(
                f"{len(device.calls)} virtqueues", hint=f"use {MAX_QUEUES} at most"
            )
        super().__init__(_ids(device.device_id, transitional=transitional), interrupt=True)
        self._interrupts = interrupts
        self._doorbells = doorbells
        self._placed: tuple[Doorbell, ...] = ()
        self._closed = False
        self._events = Events(
            (*device.calls, device.config_call),
            f"virtio device {device.device_id}",
            interrupts,
            loop,
            self._set_line,
        )
        self._transport = VirtioTransport(
            device, self._events, self._place_doorbells, loop.call_soon, ioeventfd=ioeventfd
        )
        self._legacy: Bar | None = None
        if transitional:
            self._legacy = self.add_bar(
                LEGACY_BAR, LEGACY_SIZE, LegacyBar(self._transport), io=True
            )
        msix = self._events.msix
        self.add_bar(MSIX_BAR, msix.bar_size, msix)
        self._registers = ModernBar(self._transport)
        self._modern = self.add_bar(MODERN_BAR, self._registers.size, self._registers, wide=True)
        self.add_capability(msix.capability(MSIX_BAR))
        for area in self._registers.areas:
            self.add_capability(_capability(area))
        self.add_capability(_cfg_access(self._registers))

    @property
    def doorbell_exits(self) -> int:
        """How often a doorbell that an eventfd is there for reached this process."""
        return self._transport.doorbell_exits

    @property
    def rings(self) -> list[Ring]:
        """The virtqueues as the driver placed them, as `VirtioDevice.start` gets them."""
        return self._transport.rings

    @property
    def running(self) -> bool:
        """Whether the device has its rings: from DRIVER_OK to the next reset."""
        return self._transport.state.running

    def bars_moved(self) -> None:
        """Have doorbells where the BARs are now."""
        self._place_doorbells()

    def command_written(self, before: int) -> None:
        """Have INTx be as the command register says, and stop what is no bus master any more.

        Without Bus Master Enable a function may neither use memory nor send messages (PCI 3.0,
        6.2.2): a device that loses it while it runs is as after a reset.
        """
        self._events.intx_disabled = bool(self.command & pci.PCI_COMMAND_INTX_DISABLE)
        self._events.update_line()
        if before & ~self.command & pci.PCI_COMMAND_MASTER and self.running:
            self._transport.reset()

    def unplugged(self) -> None:
        """Let go of the line that it shares."""
        self._set_line(False)

    def save(self) -> VirtioPciState:
        """Return what `restore` needs.

        vCPUs stand still and the device has stopped. Interrupts that are under way go to KVM's
        controllers and the vCPUs, so those are saved after this.
        """
        events = self._events.save()
        return VirtioPciState(self.save_config(), self._transport.save(), events)

    def restore(self, state: VirtioPciState) -> None:
        """Be as `state` says, in the slot that it was saved in.

        The device is not started: whoever calls this restores it afterwards, with `rings`.
        Raises InvalidArgument if the state is of another device or of one with other features.
        """
        self.restore_config(state.config)
        self.command_written(self.command)
        self._transport.restore(state.driver)
        self._events.restore(state.events)

    def close(self) -> None:
        """Reset the device and leave the bus; a second call does nothing.

        The eventfds may be closed afterwards."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as steps:  # all of them, whatever one raises
            if self.bus is not None:
                steps.callback(self.bus.remove, self)
            steps.callback(self._events.close)
            self._transport.halt()

    def _set_line(self, level: bool) -> None:
        self.show_interrupt(asserted=bool(self._events.isr))
        if self.gsi is not None:
            self._interrupts.line(self.gsi, level, self)

    def _place_doorbells(self) -> None:
        wanted = tuple(self._wanted_doorbells()) if self.running else ()
        if wanted == self._placed:
            return
        try:
            self._doorbells.set(self, wanted)
        except VhostctlError as error:
            log.warning("slot %s: doorbells are answered by this process: %s", self.slot, error)
            wanted = ()
            self._doorbells.set(self, wanted)
        self._placed = wanted

    def _wanted_doorbells(self) -> Iterator[Doorbell]:
        transport = self._transport
        modern = transport.features >> VIRTIO_F_VERSION_1 & 1
        bar = self._modern if modern else self._legacy
        if bar is None or bar.mapped is None:
            return
        for number, doorbell in enumerate(transport.doorbells):
            if not transport.state.queues[number].enabled:
                continue
            if modern:
                wanted = doorbell.doorbell(bar.mapped + self._registers.doorbell(number))
            else:
                port = bar.mapped + abi.VIRTIO_PCI_QUEUE_NOTIFY
                wanted = doorbell.doorbell(port, 2, number, pio=True)
            if wanted is not None:
                yield wanted


def _ids(device_id: int, *, transitional: bool) -> PciIds:
    class_code = _NETWORK_CLASS if device_id == _NETWORK else _OTHER_CLASS
    if not transitional:
        modern = _MODERN_ID + device_id
        return PciIds(_VENDOR, modern, class_code, 1, _VENDOR, modern)
    if device_id not in _TRANSITIONAL_IDS:
        raise InvalidArgument(
            f"virtio device {device_id} has no transitional PCI id", hint="have it modern only"
        )
    return PciIds(_VENDOR, _TRANSITIONAL_IDS[device_id], class_code, 0, _VENDOR, device_id)


def _capability(area: Area) -> Capability:
    cap = abi.virtio_pci_cap(
        cfg_type=area.kind,
        bar=MODERN_BAR,
        offset=area.offset,
        length=area.length,
        cap_len=ctypes.sizeof(abi.virtio_pci_cap),
    )
    if area.kind != abi.VIRTIO_PCI_CAP_NOTIFY_CFG:
        return Capability(pci.PCI_CAP_ID_VNDR, bytes(cap)[2:])
    cap.cap_len = ctypes.sizeof(abi.virtio_pci_notify_cap)
    notify = abi.virtio_pci_notify_cap(cap, NOTIFY_MULTIPLIER)
    return Capability(pci.PCI_CAP_ID_VNDR, bytes(notify)[2:])


def _cfg_access(registers: ModernBar) -> Capability:
    """Return VIRTIO_PCI_CAP_PCI_CFG: a window on the BAR for firmware that cannot map it."""

    def target(body: memoryview, part: range) -> tuple[int, int] | None:
        bar, offset, length, _ = _CFG_ACCESS.unpack(body)
        ok = part.stop > _CFG_DATA and bar == MODERN_BAR and length in (1, 2, 4)
        return (offset, length) if ok and not offset % length else None

    def reading(body: memoryview, part: range) -> None:
        if (found := target(body, part)) is not None:
            offset, length = found
            body[_CFG_DATA : _CFG_DATA + length] = registers.read(offset, length)

    def written(body: memoryview, part: range) -> None:
        if (found := target(body, part)) is not None:
            offset, length = found
            registers.write(offset, bytes(body[_CFG_DATA : _CFG_DATA + length]))

    cap = abi.virtio_pci_cfg_cap(
        abi.virtio_pci_cap(
            cap_len=ctypes.sizeof(abi.virtio_pci_cfg_cap), cfg_type=abi.VIRTIO_PCI_CAP_PCI_CFG
        )
    )
    everything = _CFG_ACCESS.pack(0xFF, 0xFFFF_FFFF, 0xFFFF_FFFF, b"\xff" * 4)
    return Capability(pci.PCI_CAP_ID_VNDR, bytes(cap)[2:], everything, reading, written)
