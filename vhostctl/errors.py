"""The exception tree of vhostctl.

Everything that this package raises on purpose is a `VhostctlError`. A refusal by the
kernel is also the built-in `OSError` class that fits its errno, so that callers may
write ``except PermissionError``. `hint` says what to do about it; ``str()`` holds both.
"""

from __future__ import annotations

import errno as _errno
import os


class VhostctlError(Exception):
    """Base of every error of this package; `hint` is the remedy, or an empty string."""

    hint: str = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}; {self.hint}" if self.hint else message


class InvalidArgument(VhostctlError, ValueError):
    """A value that the caller gave cannot work; nothing was attempted."""


class ClosedError(VhostctlError, ValueError):
    """An object was used after its `close()`."""


class StateError(VhostctlError, RuntimeError):
    """A call came in the wrong order."""


class NegotiationError(VhostctlError):
    """A feature that was required is not offered."""


class EnvironmentMissing(VhostctlError):
    """A program, module, device node or permission that the task needs is not there."""


class CheckFailed(VhostctlError):
    """A check ran to its end and found a difference."""


class KernelError(VhostctlError, OSError):
    """The kernel refused a request.

    Attributes: `errno` as OSError has it, `request` (what was asked, such as
    ``VHOST_SET_OWNER``) and `target` (of which device, queue or file).
    """

    request: str = ""
    target: str = ""

    def __init__(self, errno: int, request: str, target: str, *, hint: str = "") -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.request = request
        self.target = target
        self.hint = hint

    def __str__(self) -> str:
        number = self.errno or 0
        name = _errno.errorcode.get(number, str(number))
        text = f"{self.request} on {self.target}: {os.strerror(number)} ({name})"
        return f"{text}; {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[object, ...]:
        return (kernel_error, (self.errno, self.request, self.target, self.hint))


class KernelPermissionError(KernelError, PermissionError):
    """EPERM or EACCES."""


class KernelFileNotFoundError(KernelError, FileNotFoundError):
    """ENOENT."""


class KernelFileExistsError(KernelError, FileExistsError):
    """EEXIST."""


class KernelBlockingError(KernelError, BlockingIOError):
    """EAGAIN."""


class KernelIsADirectoryError(KernelError, IsADirectoryError):
    """EISDIR."""


class KernelNotADirectoryError(KernelError, NotADirectoryError):
    """ENOTDIR."""


class KernelProcessLookupError(KernelError, ProcessLookupError):
    """ESRCH."""


class KernelInterruptedError(KernelError, InterruptedError):
    """EINTR."""


class KernelTimeoutError(KernelError, TimeoutError):
    """ETIMEDOUT."""


# OSError picks its subclass by errno only when it is called itself, so this table does it.
_BY_ERRNO: dict[int, type[KernelError]] = {
    _errno.EPERM: KernelPermissionError,
    _errno.EACCES: KernelPermissionError,
    _errno.ENOENT: KernelFileNotFoundError,
    _errno.EEXIST: KernelFileExistsError,
    _errno.EAGAIN: KernelBlockingError,
    _errno.EISDIR: KernelIsADirectoryError,
    _errno.ENOTDIR: KernelNotADirectoryError,
    _errno.ESRCH: KernelProcessLookupError,
    _errno.EINTR: KernelInterruptedError,
    _errno.ETIMEDOUT: KernelTimeoutError,
}


def kernel_error(errno: int, request: str, target: str, hint: str = "") -> KernelError:
    """Return the KernelError subclass for `errno`; `request` was asked of `target`."""
    return _BY_ERRNO.get(errno, KernelError)(errno, request, target, hint=hint)
