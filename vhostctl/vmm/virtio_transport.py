"""What a virtio driver has set up, however it got here: virtio 1.2, sections 2.1, 2.2 and 3.1."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Annotated

import msgspec

from vhostctl.abi import virtio
from vhostctl.abi.virtio_pci import VIRTIO_MSI_NO_VECTOR
from vhostctl.control.rings import RingPlacement
from vhostctl.errors import InvalidArgument, VhostctlError
from vhostctl.vmm.log import log
from vhostctl.vmm.notifiers import HostNotifier
from vhostctl.vmm.registers import U8, U16, U32
from vhostctl.vmm.virtio import Ring, VirtioDevice
from vhostctl.vmm.virtio_events import Events

FEATURE_WORDS = 4
"""Words of 32 feature bits; all later ones are 0."""

_NOTED = (
    virtio.VIRTIO_CONFIG_S_ACKNOWLEDGE
    | virtio.VIRTIO_CONFIG_S_DRIVER
    | virtio.VIRTIO_CONFIG_S_FAILED
)
_WORD = 0xFFFF_FFFF

Address = Annotated[int, msgspec.Meta(ge=0)]


class QueueState(msgspec.Struct, forbid_unknown_fields=True):
    """A virtqueue as the driver set it up; `size` 0 is the greatest that there may be."""

    size: U16 = 0
    desc: Address = 0
    avail: Address = 0
    used: Address = 0
    enabled: bool = False


class DriverState(msgspec.Struct, forbid_unknown_fields=True):
    """Everything that the driver has written, features in words.

    `running` says that the device took its rings.
    """

    queues: list[QueueState]
    features: list[U32] = msgspec.field(default_factory=lambda: [0] * FEATURE_WORDS)
    status: U8 = 0
    device_feature_select: U32 = 0
    driver_feature_select: U32 = 0
    queue_select: U16 = 0
    generation: U8 = 0
    running: bool = False


class VirtioTransport:
    """A device's status, features and virtqueues; the layouts of registers are elsewhere.

    It implements vmm.virtio.Transport. `running_changed` is called when the device takes its
    rings and when it gives them back. Nothing here raises because of what a driver does.
    """

    def __init__(
        self,
        device: VirtioDevice,
        events: Events,
        running_changed: Callable[[], None],
        call_soon: Callable[[Callable[[], None]], None],
        *,
        ioeventfd: bool = True,
    ) -> None:
        """Be at the start; without `ioeventfd` doorbells are not left to KVM."""
        self.device = device
        self.events = events
        self.state = DriverState([QueueState() for _ in device.queue_sizes])
        self.doorbells: list[HostNotifier] = []
        self._running_changed = running_changed
        self._call_soon = call_soon
        self._ioeventfd = ioeventfd
        self._past_exits = 0
        device.attach(self)

    @property
    def doorbell_exits(self) -> int:
        """How often a doorbell that an eventfd is there for reached this process."""
        return self._past_exits + sum(doorbell.exits for doorbell in self.doorbells)

    @property
    def features(self) -> int:
        """The feature bits that the driver acknowledged."""
        return sum(bits << 32 * word for word, bits in enumerate(self.state.features))

    @property
    def rings(self) -> list[Ring]:
        """The virtqueues as the driver placed them."""
        return [
            RingPlacement(self.queue_size(n), queue.desc, queue.avail, queue.used)
            if queue.enabled
            else None
            for n, queue in enumerate(self.state.queues)
        ]

    @property
    def selected(self) -> QueueState | None:
        """The virtqueue that is selected, None if there is no such."""
        number = self.state.queue_select
        if number < len(self.state.queues) and self.device.queue_sizes[number]:
            return self.state.queues[number]
        return None

    @property
    def settable(self) -> QueueState | None:
        """The one that is selected, if the driver may set it up now."""
        queue = self.selected
        if queue is None or queue.enabled or self._has(virtio.VIRTIO_CONFIG_S_DRIVER_OK):
            return None
        return queue

    def queue_size(self, number: int) -> int:
        """Return the descriptors of virtqueue `number`, as chosen or at most."""
        return self.state.queues[number].size or self.device.queue_sizes[number]

    def selected_size(self) -> int:
        """Return the descriptors of the virtqueue that is selected, 0 if there is no such."""
        return 0 if self.selected is None else self.queue_size(self.state.queue_select)

    def set_size(self, size: int) -> None:
        """Choose the descriptors of the virtqueue: a power of two up to the greatest."""
        queue = self.settable
        limit = self.device.queue_sizes[self.state.queue_select] if queue is not None else 0
        if queue is not None and 0 < size <= limit and not size & (size - 1):
            queue.size = size

    def vector(self) -> int:
        """Return the MSI-X vector of the virtqueue that is selected."""
        if self.selected is None:
            return VIRTIO_MSI_NO_VECTOR
        return self.events.vectors[self.state.queue_select]

    def set_vector(self, vector: int) -> None:
        """Have the virtqueue that is selected interrupt by `vector`."""
        if self.selected is not None:
            self.events.assign(self.state.queue_select, vector)

    def offered(self, word: int) -> int:
        """Return feature bits 32 * `word` and up that are on offer."""
        return self.device.features >> 32 * word & _WORD if word < FEATURE_WORDS else 0

    def acknowledged(self, word: int) -> int:
        """Return feature bits 32 * `word` and up that the driver acknowledged."""
        return self.state.features[word] if word < FEATURE_WORDS else 0

    def acknowledge(self, word: int, bits: int) -> None:
        """Take feature bits 32 * `word` and up, until FEATURES_OK says that they are settled."""
        settled = virtio.VIRTIO_CONFIG_S_FEATURES_OK | virtio.VIRTIO_CONFIG_S_DRIVER_OK
        if word < FEATURE_WORDS and not self.state.status & settled:
            self.state.features[word] = bits

    def acknowledge_legacy(self, bits: int) -> None:
        """Take what a legacy driver acknowledges, which cannot be refused: the rest is dropped."""
        if not self._has(virtio.VIRTIO_CONFIG_S_DRIVER_OK):
            self.state.features = [bits & self.offered(0), *[0] * (FEATURE_WORDS - 1)]
            # There will be no FEATURES_OK, and it may say which virtqueue is which.
            self.device.accept(self.features)

    def set_status(self, status: int) -> None:
        """Take what the driver says that it did; 0 is a reset. Bits that are set stay so."""
        if not status:
            self.reset()
            return
        new = status & ~self.state.status
        self.state.status |= new & _NOTED
        if new & virtio.VIRTIO_CONFIG_S_FEATURES_OK and self._acceptable():
            self.state.status |= virtio.VIRTIO_CONFIG_S_FEATURES_OK
        if new & virtio.VIRTIO_CONFIG_S_DRIVER_OK:
            self._start()

    def ring(self, number: int) -> None:
        """Do what the doorbell of virtqueue `number` does, if there is one."""
        known = self.state.running and number < len(self.doorbells)
        if known and self.state.queues[number].enabled:
            self.doorbells[number].ring()

    def config_changed(self) -> None:
        """Tell the driver that the device's configuration is another one now."""
        self.state.generation = self.state.generation + 1 & 0xFF
        self._signal_config()

    def notify_later(self, queue: int) -> None:
        """Have the device look at a virtqueue soon; others get their turn before."""
        self._call_soon(partial(self.device.notify, queue))

    def needs_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET, and tell the driver."""
        self.state.status |= virtio.VIRTIO_CONFIG_S_NEEDS_RESET
        self._signal_config()

    def reset(self) -> None:
        """Be as at the start."""
        self.halt()
        self.events.reset()

    def halt(self) -> None:
        """Be as at the start, but for interrupts, which stay as they are."""
        was_running = self.state.running
        self.state = DriverState(
            [QueueState() for _ in self.state.queues], generation=self.state.generation
        )
        if was_running:
            self._running_changed()
        self._past_exits = self.doorbell_exits
        self.doorbells = []
        self.device.reset()

    def save(self) -> DriverState:
        """Return what the driver has set up."""
        return copy.deepcopy(self.state)

    def restore(self, state: DriverState) -> None:
        """Be as `state` says, but for the device, which is not started.

        Raises InvalidArgument if the device does not have what the state says.
        """
        if (len(state.queues), len(state.features)) != (len(self.state.queues), FEATURE_WORDS):
            raise InvalidArgument(
                f"the state has {len(state.queues)} virtqueues",
                hint=f"this device has {len(self.state.queues)}",
            )
        self.state = copy.deepcopy(state)
        settled = self._has(virtio.VIRTIO_CONFIG_S_FEATURES_OK) or state.running
        if settled and not self._acceptable():
            raise InvalidArgument(
                f"the device does not take features {self.features:#x}",
                hint=f"it offers {self.device.features:#x}",
            )
        if state.running:
            self._make_doorbells()
            self._running_changed()

    def _has(self, status: int) -> bool:
        return bool(self.state.status & status)

    def _acceptable(self) -> bool:
        return not self.features & ~self.device.features and self.device.accept(self.features)

    def _start(self) -> None:
        self.state.status |= virtio.VIRTIO_CONFIG_S_DRIVER_OK
        if self._has(virtio.VIRTIO_CONFIG_S_NEEDS_RESET):
            return
        settled = self._has(virtio.VIRTIO_CONFIG_S_FEATURES_OK)
        try:
            if not settled and not self._acceptable():
                raise InvalidArgument(f"no driver may have features {self.features:#x}")
            self.device.start(self.features, self.rings)
        except VhostctlError as error:
            log.warning("virtio device %d does not start: %s", self.device.device_id, error)
            self.needs_reset()
            return
        self.state.running = True
        self._make_doorbells()
        self._running_changed()

    def _make_doorbells(self) -> None:
        self.doorbells = [
            HostNotifier(kick, partial(self.device.notify, n), ioeventfd=self._ioeventfd)
            for n, kick in enumerate(self.device.kicks)
        ]

    def _signal_config(self) -> None:
        if self._has(virtio.VIRTIO_CONFIG_S_DRIVER_OK):
            self.device.config_call.signal()
