"""AF_UNIX sockets to listen on, systemd's or our own, and what systemd is told."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vhostctl.errors import EnvironmentMissing, InvalidArgument, kernel_error

_FIRST_FD = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
_BACKLOG = 64


_DIRECTIVES = {
    socket.SOCK_STREAM: "ListenStream=",
    socket.SOCK_SEQPACKET: "ListenSequentialPacket=",
}


@contextmanager
def listening(
    path: Path | None,
    kind: socket.SocketKind = socket.SOCK_STREAM,
    mode: int = 0o600,
) -> Iterator[list[socket.socket]]:
    """Yield the sockets of systemd (LISTEN_FDS), or one of our own at `path`.

    They are of `kind`, stream or sequential packet; a file that is made here has the `mode`.
    A socket file that nobody listens on any more is replaced; ours is removed at the end.
    Raises InvalidArgument (somebody listens there, or it is no socket; no path where one is
    needed), EnvironmentMissing (systemd's are of another kind) and KernelError.
    """
    sockets = _inherited(kind)
    if not sockets:
        if path is None:
            raise InvalidArgument("no socket to listen on", hint="name one, or let systemd")
        sockets = [_bind(path, kind, mode)]
        made = path.stat()
    else:
        made = None
    try:
        yield sockets
    finally:
        if path is not None and made is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), made):
                    path.unlink()
        for each in sockets:
            each.close()


def _inherited(kind: socket.SocketKind) -> list[socket.socket]:
    """Return the sockets that the process was started with; its children get none of them."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    sockets: list[socket.socket] = []
    for fd in range(_FIRST_FD, _FIRST_FD + (int(count) if count.isdecimal() else 0)):
        try:
            os.set_inheritable(fd, False)
            each = socket.socket(fileno=fd)
        except OSError as error:
            raise kernel_error(error.errno or 0, "LISTEN_FDS", f"descriptor {fd}") from error
        accepts = each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not accepts or (each.family, each.type) != (socket.AF_UNIX, kind):
            raise EnvironmentMissing(
                f"descriptor {fd} of LISTEN_FDS is no listening AF_UNIX {kind.name} socket",
                hint=f"set {_DIRECTIVES[kind]} to a path in the socket unit",
            )
        sockets.append(each)
    return sockets


def _bind(path: Path, kind: socket.SocketKind, mode: int) -> socket.socket:
    _make_room(path, kind)
    bound = socket.socket(socket.AF_UNIX, kind)
    try:
        bound.bind(str(path))
        try:
            path.chmod(mode)  # before listen(): until then nobody can connect
            bound.listen(_BACKLOG)
        except BaseException:
            path.unlink()
            raise
    except OSError as error:
        bound.close()
        if error.errno is None:  # Python's own check of the length
            raise InvalidArgument(f"socket {path}: {error}", hint="use a shorter path") from error
        raise kernel_error(error.errno, "bind", str(path), "check the path") from error
    except BaseException:
        bound.close()
        raise
    return bound


def _make_room(path: Path, kind: socket.SocketKind) -> None:
    """Remove the socket file of a process that is gone."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InvalidArgument(f"{path} is there and no socket", hint="choose another path")
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.setblocking(False)
            probe.connect(str(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return
    except BlockingIOError:
        pass  # its backlog is full: somebody does listen
    except OSError as error:
        if error.errno is not None:
            raise kernel_error(error.errno, "connect", str(path), "check the path") from error
        return  # too long a path; bind() will say so
    raise InvalidArgument(f"somebody listens on {path} already", hint="choose another path")


def notify(state: str) -> None:
    """Tell systemd `state`, such as ``READY=1``, if it wants to know (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
        sock.send(state.encode())
