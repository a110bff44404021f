"""One eventfd: the doorbell between driver and device."""

from __future__ import annotations

import math
import os
import select
from pathlib import Path
from typing import Self

from vhostctl.errors import InvalidArgument, kernel_error
from vhostctl.host.handle import Handle

_LINK = "anon_inode:[eventfd]"


class EventFd(Handle):
    """An eventfd counter (eventfd(2)): close-on-exec and non-blocking, if it was made here."""

    @classmethod
    def create(cls, label: str = "eventfd") -> Self:
        """Return a new eventfd with the counter at 0.

        Raises KernelError (EMFILE, ENFILE, ENOMEM).
        """
        try:
            return cls(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), label)
        except OSError as error:
            raise kernel_error(error.errno or 0, "eventfd", label) from error

    @classmethod
    def adopt(cls, fd: int, label: str = "eventfd") -> Self:
        """Own `fd`, an eventfd that somebody else made, without EFD_SEMAPHORE.

        Its flags stay as they are: whoever shares it may rely on reads that block. Raises
        InvalidArgument for any other descriptor, which stays the caller's.
        """
        try:
            what = str(Path(f"/proc/self/fd/{fd}").readlink())
        except OSError:
            what = "not open"
        if what != _LINK:
            raise InvalidArgument(f"{label}: descriptor {fd} is {what}", hint="hand in an eventfd")
        return cls(fd, label)

    def signal(self, count: int = 1) -> None:
        """Add `count` to the counter and wake whoever waits for it."""
        os.eventfd_write(self.fileno(), count)

    def drain(self) -> int:
        """Return the counter and set it to 0; 0 if nothing was signalled. Never waits."""
        counter = bytearray(8)
        try:
            # Beside somebody else's reader a poll before a blocking read would prove nothing.
            os.preadv(self.fileno(), [counter], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        return int.from_bytes(counter, "little")

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until the counter is not 0, at most `timeout` seconds; leaves it as it is.

        Returns whether it is not 0.
        """
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return bool(poll.poll(None if timeout is None else math.ceil(timeout * 1000)))
