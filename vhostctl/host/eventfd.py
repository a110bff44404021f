"""One eventfd: the doorbell between driver and device."""

from __future__ import annotations

import os
from typing import Self

from vhostctl.errors import kernel_error
from vhostctl.host.handle import Handle


class EventFd(Handle):
    """A non-blocking, close-on-exec eventfd counter (eventfd(2))."""

    @classmethod
    def create(cls, label: str = "eventfd") -> Self:
        """Return a new eventfd with the counter at 0.

        Raises KernelError (EMFILE, ENFILE, ENOMEM).
        """
        try:
            return cls(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), label)
        except OSError as error:
            raise kernel_error(error.errno or 0, "eventfd", label) from error

    def signal(self, count: int = 1) -> None:
        """Add `count` to the counter and wake whoever waits for it."""
        os.eventfd_write(self.fileno(), count)

    def drain(self) -> int:
        """Return the counter and set it to 0; 0 if nothing was signalled."""
        try:
            return os.eventfd_read(self.fileno())
        except BlockingIOError:
            return 0
