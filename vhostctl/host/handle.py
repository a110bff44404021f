"""One object, one owned descriptor."""

from __future__ import annotations

import os
import warnings

from vhostctl.errors import ClosedError
from vhostctl.host.closing import Closing


class Handle(Closing):
    """Owns one file descriptor from construction until `close()` or `detach()`.

    `label` names it in error messages. Not synchronised: a thread that closes a handle
    must know that no other thread is inside one of its methods.
    """

    def __init__(self, fd: int, label: str) -> None:
        self._fd: int | None = fd
        self.label = label

    def fileno(self) -> int:
        """Return the descriptor; it stays owned by this object.

        Raises ClosedError after `close()`.
        """
        if self._fd is None:
            raise ClosedError(f"{self.label} is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether the descriptor has been closed or detached."""
        return self._fd is None

    def detach(self) -> int:
        """Return the descriptor and give up its ownership: the caller closes it."""
        fd, self._fd = self.fileno(), None
        return fd

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            warnings.warn(f"{self.label} was never closed", ResourceWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._fd is None else f"fd {self._fd}"
        return f"<{type(self).__name__} {self.label} {state}>"
