"""Who is at the other end of a UNIX socket, as the kernel noted it when they connected."""

from __future__ import annotations

import ctypes
import os
import pwd
import socket
import struct
from dataclasses import dataclass
from typing import Self

_SO_PEERGROUPS = 59  # asm-generic/socket.h; Python 3.11 does not name it
_MOST_GROUPS = 65536  # NGROUPS_MAX of linux/limits.h
_CREDENTIALS = struct.Struct("=iII")  # struct ucred of linux/socket.h

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Peer:
    """A caller's credentials; `gids` has the primary group and the supplementary ones."""

    pid: int
    uid: int
    gids: frozenset[int]

    @classmethod
    def of(cls, connection: socket.socket) -> Self:
        """Ask the kernel (SO_PEERCRED, SO_PEERGROUPS). Raises OSError."""
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(data)
        return cls(pid, uid, frozenset({gid, *_groups(connection)}))

    @property
    def user(self) -> str:
        """The user's name, if there is one, and number."""
        try:
            return f"{pwd.getpwuid(self.uid).pw_name} (uid {self.uid})"
        except KeyError:
            return f"uid {self.uid}"

    def __str__(self) -> str:
        return f"{self.user}, pid {self.pid}"


def _groups(connection: socket.socket) -> list[int]:
    # Not getsockopt() of Python, whose buffer has room for 256 groups.
    gids = (ctypes.c_uint32 * _MOST_GROUPS)()
    size = ctypes.c_uint32(ctypes.sizeof(gids))
    level = socket.SOL_SOCKET
    if _libc.getsockopt(connection.fileno(), level, _SO_PEERGROUPS, gids, ctypes.byref(size)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "SO_PEERGROUPS")
    return gids[: size.value // ctypes.sizeof(ctypes.c_uint32)]
