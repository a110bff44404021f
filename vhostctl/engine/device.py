"""The embedded device as a channel: it answers what a descriptor of the node would."""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass

from vhostctl.abi.ioctl import Request
from vhostctl.engine import _native as native
from vhostctl.errors import ClosedError, StateError, kernel_error
from vhostctl.host.closing import Closing

_ADDRESSES = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class RingStats:
    """What a ring counted since the device was opened (struct vhm_stats).

    `drops` are frames that no buffer was right for, and those that were read ahead and still
    there when the device was reset or got another file. Of what the driver did wrong:
    `bad_rings` (an index out of range, a ring that cannot be read), `bad_chains`,
    `bad_addresses`, `bad_buffers` (chains of the wrong direction, or empty), `bad_frames`
    (bytes that make no frame), `bad_used` (a used ring that cannot be written). `misses`
    are translations that were asked for.
    """

    runs: int
    frames: int
    bytes: int
    signals: int
    drops: int
    bad_rings: int
    bad_chains: int
    bad_addresses: int
    bad_buffers: int
    bad_frames: int
    bad_used: int
    misses: int


class Engine(Closing):
    """One vhost-net device in this process, whose worker is a thread of it.

    A child made by fork() has a copy that it does not own and may close. Faults on guest
    memory that is gone are caught by handlers of SIGSEGV and SIGBUS, which pass on every
    other fault to the handlers that they found. Not synchronised: a thread that closes an
    engine must know that no other thread is inside one of its methods.
    """

    def __init__(self, label: str) -> None:
        """Make a device; `label` names it in errors. Raises KernelError (EMFILE, ENOMEM)."""
        self.label = label
        self._engine: native.CData | None = None
        engine = native.ffi.new("struct engine **")
        error = native.lib.engine_open(engine)
        if error:
            raise kernel_error(-error, "open", label, "raise the limit of open files (ulimit -n)")
        self._engine = engine[0]

    @property
    def _open(self) -> native.CData:
        if self._engine is None:
            raise ClosedError(f"{self.label} is closed")
        return self._engine

    @property
    def closed(self) -> bool:
        """Whether the device has been closed."""
        return self._engine is None

    def ioctl(self, request: Request, argument: object) -> int:
        """As ioctl(2): return its result, raise OSError with its errno.

        `argument` is a ctypes object, an int (an address, which need not be valid) or None.
        """
        address = argument or 0 if argument is None or isinstance(argument, int) else None
        if address is None:
            address = ctypes.addressof(argument)  # type: ignore[arg-type]
        return _checked(native.lib.engine_ioctl(self._open, request.number, address & _ADDRESSES))

    def read(self, size: int) -> bytes:
        """As read(2) without blocking: an IOTLB message of at most `size` bytes, or OSError."""
        buffer = ctypes.create_string_buffer(size)
        length = native.lib.engine_read(self._open, ctypes.addressof(buffer), size)
        return buffer.raw[: _checked(length)]

    def write(self, data: bytes) -> int:
        """As write(2): return how many bytes it says it took, raise OSError with its errno."""
        buffer = ctypes.create_string_buffer(data, len(data))
        return _checked(native.lib.engine_write(self._open, ctypes.addressof(buffer), len(data)))

    def fileno(self) -> int:
        """Return a descriptor that is readable while an IOTLB message waits, for poll(2) only.

        Raises ClosedError after `close()`.
        """
        return native.lib.engine_fileno(self._open)

    def detach(self) -> int:
        """Raise StateError: an engine cannot leave its process."""
        raise StateError(
            f"{self.label} is part of this process and cannot be handed over",
            hint="use a device node",
        )

    def worker(self) -> int | None:
        """Return the thread id of the worker; None before SET_OWNER and in other processes."""
        return native.lib.engine_worker(self._open) or None

    def settle(self, queue: int) -> int:
        """Let the ring `queue` read no more frames from its backend, until one is set.

        It goes on to deliver those that it has read ahead; returns how many are left of them.
        After 0 the backend has all the others, for another device or reader. OSError: ENOBUFS
        if there is no such ring, EPERM if this process is not the owner.
        """
        return _checked(native.lib.engine_settle(self._open, queue))

    def stats(self, queue: int) -> RingStats:
        """Return what the ring `queue` counted; OSError (ENOBUFS) if there is no such ring."""
        stats = native.ffi.new("struct vhm_stats *")
        _checked(native.lib.engine_stats(self._open, queue, stats))
        return RingStats(*(getattr(stats, name) for name in RingStats.__slots__))

    def close(self) -> None:
        """Close the device; its worker has ended when this returns. A second call does nothing."""
        engine, self._engine = self._engine, None
        if engine is not None:
            native.lib.engine_close(engine)

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None:
            warnings.warn(f"{self.label} was never closed", ResourceWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<Engine {self.label}{' closed' if self.closed else ''}>"


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
