"""A virtio device's interrupts over PCI: virtio 1.2, sections 4.1.4.5 and 4.1.5.1.2 to 4.1.5.4."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec

from vhostctl.abi.virtio_pci import VIRTIO_MSI_NO_VECTOR, VIRTIO_PCI_ISR_CONFIG
from vhostctl.errors import InvalidArgument, VhostctlError
from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd
from vhostctl.vmm.interrupts import Interrupts, Msi
from vhostctl.vmm.log import log
from vhostctl.vmm.msix import Msix, MsixState
from vhostctl.vmm.notifiers import GuestNotifier, Watcher
from vhostctl.vmm.registers import U16

ISR_QUEUE = 1


class EventsState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where events go and which wait: lists are by source, each virtqueue and then config."""

    vectors: tuple[U16, ...]
    pending: tuple[bool, ...]
    isr: int
    msix: MsixState


class Events(Closing):
    """The sources of a device's interrupts, each led to where guest and machine want it.

    A source is a virtqueue, by its number, or the configuration, the last one. With MSI-X on,
    events of a source go to its vector, by irqfd if there are irqfds; while that is masked, or
    there is none, they wait. With MSI-X off they go into the ISR, and that to INTx.
    """

    def __init__(
        self,
        calls: Sequence[EventFd],
        label: str,
        interrupts: Interrupts,
        loop: Watcher,
        set_line: Callable[[bool], None],
    ) -> None:
        """Take the events of `calls`, one for each source; `set_line` raises and lowers INTx.

        Raises InvalidArgument for more sources than MSI-X has vectors, KernelError.
        """
        self._calls = tuple(calls)
        self._label = label
        self._interrupts = interrupts
        self._loop = loop
        self._set_line = set_line
        self._notifiers = [
            GuestNotifier(call, f"{label} event {n}") for n, call in enumerate(calls)
        ]
        self._gsis: dict[int, int] = {}
        self.vectors = [VIRTIO_MSI_NO_VECTOR] * len(self._calls)
        self.isr = 0
        self.intx_disabled = False
        self.msix = Msix(len(self._calls), self._messages_changed, self._pending, self._switched)
        try:
            self._connect_all()
        except BaseException:
            self.close()
            raise

    @property
    def config(self) -> int:
        """The source that is the configuration."""
        return len(self._calls) - 1

    def assign(self, source: int, vector: int) -> None:
        """Have events of `source` go to `vector`; to none if there is no such vector."""
        before = self.vectors[source]
        self.vectors[source] = vector if vector < self.msix.count else VIRTIO_MSI_NO_VECTOR
        self._connect(source)
        self._release_unused(before)

    def read_isr(self) -> int:
        """Return the ISR, which that clears."""
        isr, self.isr = self.isr, 0
        self.update_line()
        return isr

    def update_line(self) -> None:
        """Have INTx be what ISR, MSI-X and command register say."""
        self._set_line(bool(self.isr) and not self.msix.enabled and not self.intx_disabled)

    def reset(self) -> None:
        """Forget vectors and events, as the device does at a reset; the MSI-X table stays."""
        self._forget_vectors()
        for call in self._calls:
            call.drain()
        self.isr = 0
        self.update_line()
        self._connect_all()

    def close(self) -> None:
        """Take no events any more; a second call does nothing."""
        self._forget_vectors()
        self.isr = 0
        self.update_line()

    def save(self) -> EventsState:
        """Return where events go, and which have not got there.

        What this leaves to KVM is in its controllers then, so those are saved afterwards.
        """
        for notifier in self._notifiers:
            notifier.hold()
        pending = tuple(notifier.pending for notifier in self._notifiers)
        self._connect_all()
        return EventsState(tuple(self.vectors), pending, self.isr, self.msix.save())

    def restore(self, state: EventsState) -> None:
        """Be as `state` says. Raises InvalidArgument if it is of another device."""
        if not len(state.vectors) == len(state.pending) == len(self._calls):
            raise InvalidArgument(
                f"{self._label}: the state has {len(state.vectors)} sources of interrupts",
                hint=f"this device has {len(self._calls)}",
            )
        self.vectors[:] = [
            vector if vector < self.msix.count else VIRTIO_MSI_NO_VECTOR for vector in state.vectors
        ]
        self.isr = state.isr & (ISR_QUEUE | VIRTIO_PCI_ISR_CONFIG)
        self.msix.restore(state.msix)
        self._connect_all()
        for call, pending in zip(self._calls, state.pending, strict=True):
            if pending:
                call.signal()
        self.update_line()

    def _connect_all(self) -> None:
        self._connect_some(range(len(self._notifiers)))

    def _connect_some(self, sources: Sequence[int]) -> None:
        messages: dict[int, Msi | None] = {}
        for source in sources:
            message = self.msix.message(self.vectors[source])
            if message is not None and self._interrupts.uses_irqfd:
                messages[self._gsi(self.vectors[source])] = message
        # All at once; who cannot have its own is found, one by one, below.
        with contextlib.suppress(VhostctlError):
            self._interrupts.route_all(messages)
        for source in sources:
            self._connect(source)

    def _gsi(self, vector: int) -> int:
        if vector not in self._gsis:
            self._gsis[vector] = self._interrupts.allocate()
        return self._gsis[vector]

    def _connect(self, source: int) -> None:
        notifier, vector = self._notifiers[source], self.vectors[source]
        message = self.msix.message(vector)
        if not self.msix.enabled:
            notifier.to_userspace(self._loop, partial(self._to_isr, source))
        elif message is None:
            notifier.hold()
        elif not self._interrupts.uses_irqfd or not self._to_irqfd(notifier, vector, message):
            notifier.to_userspace(self._loop, partial(self._send, vector))

    def _to_irqfd(self, notifier: GuestNotifier, vector: int, message: Msi) -> bool:
        gsi = self._gsi(vector)
        try:
            self._interrupts.route(gsi, message)
            notifier.to_irqfd(self._interrupts, gsi)
        except VhostctlError as error:
            # The guest chose the message: what KVM makes of it is no reason to end.
            log.warning("%s: no irqfd, interrupts are sent without: %s", notifier.label, error)
            return False
        return True

    def _send(self, vector: int) -> None:
        message = self.msix.message(vector)
        if message is None:
            return
        try:
            self._interrupts.signal(message)
        except VhostctlError as error:
            log.debug("%s: vector %d: %s", self._label, vector, error)

    def _to_isr(self, source: int) -> None:
        self.isr |= VIRTIO_PCI_ISR_CONFIG if source == self.config else ISR_QUEUE
        self.update_line()

    def _messages_changed(self, changes: Mapping[int, Msi | None]) -> None:
        if self.msix.enabled:
            self._connect_some([s for s, vector in enumerate(self.vectors) if vector in changes])

    def _switched(self) -> None:
        self._connect_all()
        self.update_line()

    def _pending(self, vector: int) -> bool:
        return any(
            notifier.pending
            for notifier, its in zip(self._notifiers, self.vectors, strict=True)
            if its == vector
        )

    def _forget_vectors(self) -> None:
        for notifier in self._notifiers:
            notifier.hold()
        self.vectors[:] = [VIRTIO_MSI_NO_VECTOR] * len(self.vectors)
        for vector in tuple(self._gsis):
            self._release_unused(vector)

    def _release_unused(self, vector: int) -> None:
        if vector in self._gsis and vector not in self.vectors:
            self._interrupts.release(self._gsis.pop(vector))
