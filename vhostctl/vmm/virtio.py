"""What a virtio transport asks of a device, and a device of its transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vhostctl.control.rings import RingPlacement
from vhostctl.host.eventfd import EventFd

Ring = RingPlacement | None
"""A virtqueue as the driver placed it; None while it is not enabled."""


class Transport(Protocol):
    """What a device may ask of the transport that it sits on."""

    def config_changed(self) -> None:
        """Tell the driver that the device's configuration is another one now."""

    def notify_later(self, queue: int) -> None:
        """Have `notify(queue)` called soon; others get their turn before."""

    def needs_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET (virtio 1.2, 2.1.1): nothing works until the driver resets."""


class VirtioDevice(Protocol):
    """A virtio device (virtio 1.2, section 2) without its transport, which calls it.

    Calls come one at a time. None of them raises because of anything that the driver did,
    but for those that say so.
    """

    @property
    def device_id(self) -> int:
        """VIRTIO_ID_*: 1 is a network device."""

    @property
    def features(self) -> int:
        """Bits that are on offer."""

    @property
    def queue_sizes(self) -> Sequence[int]:
        """The greatest size of each virtqueue; for one that there is not, 0."""

    @property
    def kicks(self) -> Sequence[EventFd | None]:
        """What the driver's doorbell of each virtqueue signals; None has `notify()` called."""

    @property
    def calls(self) -> Sequence[EventFd]:
        """What is signalled when a virtqueue has used buffers."""

    @property
    def config_call(self) -> EventFd:
        """What is signalled when the configuration changes."""

    def attach(self, transport: Transport) -> None:
        """Know the transport from now on."""

    def read_config(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the configuration; what there is not reads 0."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Change the configuration, as far as a driver may."""

    def accept(self, features: int) -> bool:
        """Return whether the driver may have these `features` (FEATURES_OK), a part of ours."""

    def start(self, features: int, rings: Sequence[Ring]) -> None:
        """Work on `rings` from now on (DRIVER_OK); one for each virtqueue.

        Raises VhostctlError if it cannot, and is then as before.
        """

    def notify(self, queue: int) -> None:
        """Look at a virtqueue whose doorbell was rung, and which has no eventfd for it."""

    def reset(self) -> None:
        """Be as at the start: nothing of the driver's memory is touched any more."""

    def close(self) -> None:
        """Be reset and close what is its own; a second call does nothing."""
