"""The calls of the rings: who hears of used buffers, and when."""

from __future__ import annotations

from typing import Protocol

from vhostctl.errors import VhostctlError
from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd


class CallTarget(Protocol):
    """What takes the call of a ring: a VhostNet."""

    def set_vring_call(self, queue: int, eventfd: int | None, /) -> None:
        """VHOST_SET_VRING_CALL."""


class CallNotifier(Closing):
    """The call of one ring: the guest's eventfd, or while it is masked one of our own.

    `call` is the guest's and stays the caller's. What comes while masked is delivered at
    `unmask()`, as one signal. Not synchronised: one thread at a time masks and unmasks; the
    device and whoever reads the guest's eventfd may do so meanwhile.
    """

    # No event is lost: there is always an eventfd bound, for without one the device does not
    # even decide whether to signal. It signals under the ring's lock, and so does
    # SET_VRING_CALL change the binding: when unmask() has bound the guest's, nothing goes into
    # ours any more, and what came before is in it for good. To look first and bind after would
    # lose what comes in between.

    def __init__(self, vhost: CallTarget, ring: int, call: EventFd, label: str) -> None:
        """Take the guest's eventfd; the device hears of it at `bind()`.

        `ring` is the device's number of it, `label` names it in errors. Raises KernelError
        (EMFILE, ENFILE, ENOMEM).
        """
        self._vhost = vhost
        self._ring = ring
        self._guests = call
        self._ours = EventFd.create(f"masked call of {label}")
        self._bound = False
        self._masked = False

    @property
    def masked(self) -> bool:
        """Whether the guest's eventfd is left alone."""
        return self._masked

    @property
    def pending(self) -> bool:
        """Whether something came while masked; `unmask()` will deliver it."""
        return self._ours.wait(0)

    def bind(self) -> None:
        """VHOST_SET_VRING_CALL with the eventfd whose turn it is; from now on masks do so too.

        Raises KernelError (EPERM before VHOST_SET_OWNER).
        """
        self._tell(self._ours if self._masked else self._guests)
        self._bound = True

    def mask(self, *, pending: bool = False) -> None:
        """Keep events from the guest until `unmask()`; nothing if that is so. KernelError.

        `pending` says that one came while somebody else had the call masked.
        """
        if self._masked:
            return
        if pending:
            self._ours.signal()
        self._masked = True  # first: an interrupt may come behind the request
        try:
            if self._bound:
                self._tell(self._ours)
        except VhostctlError:
            self._masked = False
            raise

    def unmask(self) -> None:
        """Let events through, and signal once if any came while masked. KernelError."""
        if not self._masked:
            return
        if self._bound:
            self._tell(self._guests)
        if self.pending:
            self._guests.signal()  # before the drain: an interrupt between them loses nothing
            self._ours.drain()
        self._masked = False

    def _tell(self, event: EventFd) -> None:
        self._vhost.set_vring_call(self._ring, event.fileno())

    def close(self) -> None:
        """Close what is ours; a second call does nothing. The device may keep it bound."""
        self._ours.close()
