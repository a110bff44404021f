"""A network namespace without a name: it lives as long as the thread that holds it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from vhostctl.errors import kernel_error
from vhostctl.host.closing import Closing

_CLONE_NEWNET = 0x40000000  # linux/sched.h; os.unshare() comes with Python 3.12

T = TypeVar("T")


def unshare() -> None:
    """Move the calling thread into a fresh namespace. Raises KernelError (EPERM)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise kernel_error(
            ctypes.get_errno(), "unshare", "network namespace", "run with CAP_SYS_ADMIN"
        )


class NetNamespace(Closing):
    """A fresh network namespace and a thread inside it; a context manager.

    Nothing on the file system names it, so it cannot outlive the process. Sockets and
    taps opened inside stay in it and may be used from any thread.
    """

    def __init__(self) -> None:
        """Make the namespace. Raises KernelError (EPERM without CAP_SYS_ADMIN)."""
        self._thread = ThreadPoolExecutor(1, "vhostctl-netns")
        try:
            self.run(unshare)
        except BaseException:
            self.close()
            raise

    def run(self, function: Callable[[], T]) -> T:
        """Return function(), called inside the namespace; its exceptions come through.

        Keep it short: an interrupt ends the wait for it, and not the function.
        """
        return self._thread.submit(function).result()

    def open(self) -> int:
        """Return a descriptor of the namespace (for setns(2)); the caller closes it."""
        return self.run(lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    def close(self) -> None:
        """End the thread; the namespace goes with the last descriptor in it."""
        self._thread.shutdown()
