"""Exit statuses of vhostctl, and which error gives which."""

from __future__ import annotations

import enum
import errno

from vhostctl.errors import (
    CheckFailed,
    EnvironmentMissing,
    InvalidArgument,
    KernelError,
    VhostctlError,
)


class ExitCode(enum.IntEnum):
    """What vhostctl ends with; `lab run` passes on its command's status besides."""

    OK = 0
    FAILED = 1
    USAGE = 2
    MISSING = 3
    DIFFERENT = 4
    TIME_LIMIT = 124
    VM_LOST = 125
    INTERRUPTED = 130
    TERMINATED = 143


_MISSING = {errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EACCES, errno.EPERM}


def exit_code(error: VhostctlError) -> ExitCode:
    """Return the exit status that `error` gives."""
    if isinstance(error, InvalidArgument):
        return ExitCode.USAGE
    if isinstance(error, EnvironmentMissing):
        return ExitCode.MISSING
    if isinstance(error, CheckFailed):
        return ExitCode.DIFFERENT
    if isinstance(error, KernelError) and error.errno in _MISSING:
        return ExitCode.MISSING
    return ExitCode.FAILED
