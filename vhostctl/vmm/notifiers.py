"""Events between guest and device: eventfds that KVM reads and writes, or this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd
from vhostctl.vmm.doorbells import Doorbell


class EventSink(Protocol):
    """What raises a GSI whenever an eventfd is signalled: Interrupts."""

    def connect(self, event_fd: int, gsi: int, /) -> None:
        """Begin, with what waits in the eventfd."""

    def disconnect(self, event_fd: int, gsi: int, /) -> None:
        """End; what came until then is raised."""


class Watcher(Protocol):
    """What calls back for an eventfd that was signalled: a Loop."""

    def watch(self, fd: int, callback: Callable[[], None], /) -> None:
        """Begin."""

    def unwatch(self, fd: int, /) -> None:
        """End; afterwards the callback neither runs nor will run."""

    def call_soon(self, callback: Callable[[], None], /) -> None:
        """Call back once, without an event."""


class GuestNotifier(Closing):
    """One source of a device's events for the guest: its `call`, and who takes it at present.

    Held, as at the start, nobody does: what comes waits in the eventfd, as `pending`, and goes
    to whoever is next. No event is lost, however often that changes; several that come close
    together may arrive as one. For one thread at a time, under the loop's lock; the device
    signals whenever it likes. `call` stays the caller's and is open until `close()`.
    """

    # What KVM_IRQFD does makes this as short as it is: to assign looks at the eventfd, and
    # raises what waits in it; to deassign takes the eventfd's waiter away and its counter to 0
    # under one lock, and returns when all that the counter stood for was raised. So nobody
    # has to drain: that would take an event that came in between.

    def __init__(self, call: EventFd, label: str) -> None:
        """Hold `call`; `label` says whose it is."""
        self.label = label
        self._call = call
        self._release: Callable[[], None] | None = None
        self._gsi: tuple[EventSink, int] | None = None

    @property
    def held(self) -> bool:
        """Whether events wait."""
        return self._release is None

    @property
    def pending(self) -> bool:
        """Whether it is held and something waits."""
        return self.held and self._call.wait(0)

    def to_irqfd(self, interrupts: EventSink, gsi: int) -> None:
        """Have KVM raise `gsi` for every event. If this raises, it is held.

        Raises KernelError, and what else `interrupts` does.
        """
        if self._gsi == (interrupts, gsi):
            return
        self.hold()
        fd = self._call.fileno()
        interrupts.connect(fd, gsi)
        self._gsi = interrupts, gsi
        self._release = lambda: interrupts.disconnect(fd, gsi)

    def to_userspace(self, loop: Watcher, handler: Callable[[], None]) -> None:
        """Have `loop` call `handler` for every event. If this raises, it is held. KernelError."""
        self.hold()
        fd = self._call.fileno()

        def callback() -> None:
            if self._call.drain():
                handler()

        loop.watch(fd, callback)
        self._release = lambda: loop.unwatch(fd)

    def hold(self) -> None:
        """Have events wait. Raises KernelError, and is as before then."""
        if self._release is not None:
            self._release()
            self._release = self._gsi = None

    def close(self) -> None:
        """As `hold()`; the eventfd may be closed afterwards."""
        self.hold()


class HostNotifier:
    """The doorbell of one virtqueue, the driver's kick: KVM signals it, or this process does.

    `exits` counts the writes that reached this process although the queue has an eventfd.
    """

    def __init__(
        self, kick: EventFd | None, notify: Callable[[], None], *, ioeventfd: bool = True
    ) -> None:
        """Ring `kick`, or for a queue without one call `notify`.

        Without `ioeventfd`, KVM is left out: every write is an exit. `kick` stays the caller's.
        """
        self._kick = kick
        self._notify = notify
        self._ioeventfd = ioeventfd
        self.exits = 0

    def doorbell(
        self, address: int, length: int = 0, datamatch: int | None = None, *, pio: bool = False
    ) -> Doorbell | None:
        """Return what to give to `Doorbells.set()` for this place; None if KVM is left out."""
        if self._kick is None or not self._ioeventfd:
            return None
        return Doorbell(self._kick, address, length, datamatch, pio)

    def ring(self) -> None:
        """Do what a write to the doorbell does, for one that reached this process."""
        if self._kick is None:
            self._notify()
            return
        self.exits += 1
        self._kick.signal()
