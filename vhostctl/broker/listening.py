"""The socket that a broker listens on: systemd's, or one of its own."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vhostctl.errors import InvalidArgument, VhostctlError, kernel_error

_FIRST = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
_WAITING = 64
_LONGEST = 107  # bytes of sun_path (unix(7)) less the last


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen on the socket that systemd handed over, or else on `path`, open to everybody.

    A socket that is left at `path` by a broker that was killed is replaced; ours is removed at
    the end. Raises InvalidArgument and KernelError (EADDRINUSE: somebody listens there).
    """
    if os.environ.pop("LISTEN_PID", "") == str(os.getpid()):
        with _handed_over(int(os.environ.pop("LISTEN_FDS", "0"))) as sock:
            yield sock
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        _bind(sock, path)
        try:
            path.chmod(0o666)
            sock.listen(_WAITING)
            yield sock
        finally:
            with suppress(FileNotFoundError):
                path.unlink()


def _handed_over(count: int) -> socket.socket:
    if count != 1:
        raise InvalidArgument(f"{count} sockets from systemd", hint="a broker takes one")
    sock = socket.socket(fileno=_FIRST)
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if (sock.family, sock.type, listens) != (socket.AF_UNIX, socket.SOCK_SEQPACKET, 1):
        sock.close()
        raise InvalidArgument(
            "the socket from systemd is no listening SOCK_SEQPACKET",
            hint="the socket unit wants ListenSequentialPacket=",
        )
    os.set_inheritable(_FIRST, False)
    return sock


def _bind(sock: socket.socket, path: Path) -> None:
    if len(os.fsencode(path)) > _LONGEST:
        raise InvalidArgument(f"{path}: longer than a socket's path may be", hint="shorten it")
    try:
        try:
            sock.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _left_over(path):
                raise
            path.unlink()
            sock.bind(str(path))
    except OSError as error:
        raise _refusal(error, path) from error


def _left_over(path: Path) -> bool:
    """Whether a socket is there that nobody listens on."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


def _refusal(error: OSError, path: Path) -> VhostctlError:
    hint = {
        errno.EADDRINUSE: "a broker listens there: stop it, or take another path",
        errno.ENOENT: "its directory is missing",
        errno.EACCES: "run as root",
    }.get(error.errno or 0, "")
    return kernel_error(error.errno or 0, "bind", str(path), hint)
