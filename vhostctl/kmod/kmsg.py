"""The kernel's log while something is asked of it: Documentation/ABI/testing/dev-kmsg."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Self

_RECORD = 8192  # bytes; a read of less than a record is EINVAL


class KernelLog:
    """What the kernel logs from the beginning of a with block on."""

    def __init__(self) -> None:
        self._fd = -1

    def __enter__(self) -> Self:
        with suppress(OSError):  # not there in some containers, not for everybody elsewhere
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        return self

    def __exit__(self, *_raised: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def messages(self) -> list[str]:
        """Return the messages since the last call; none where the log may not be read."""
        found = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, _RECORD)
            except BrokenPipeError:
                continue  # overwritten before it was read; the next one is there
            except OSError:
                break
            text = record.decode(errors="replace").partition(";")[2]
            found.append(text.partition("\n")[0])
        return found
