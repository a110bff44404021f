"""The broker's loop: one request a connection, each of which costs nobody but its sender."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vhostctl.broker.grant import granted
from vhostctl.broker.peer import Peer
from vhostctl.broker.policy import Policy
from vhostctl.broker.protocol import (
    LONGEST,
    Denied,
    Failed,
    Granted,
    Refused,
    denial,
    parse_request,
)
from vhostctl.errors import InvalidArgument, VhostctlError, kernel_error
from vhostctl.host.closing import Closing
from vhostctl.host.listening import listening

PATIENCE = 5.0
"""Seconds that a caller has for its request."""

SILENT = 8
"""Connections of one user that may be open without a request."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Caller:
    connection: socket.socket
    peer: Peer
    deadline: float


@contextmanager
def listener(path: Path) -> Iterator[socket.socket]:
    """Yield the socket that systemd handed over, or one at `path` that is everybody's.

    Raises InvalidArgument, also for more than one from systemd, and as `listening()`.
    """
    with listening(path, socket.SOCK_SEQPACKET, 0o666) as sockets:
        if len(sockets) != 1:
            raise InvalidArgument(f"{len(sockets)} sockets from systemd", hint="a broker takes one")
        yield sockets[0]


class Broker(Closing):
    """Answers on `listener`, which stays the caller's, by `policy`; logs every request.

    A request is served at once and whole: there is nothing in it to wait for.
    """

    def __init__(self, listener: socket.socket, policy: Policy) -> None:
        self._listener = listener
        self._policy = policy
        self._selector = selectors.DefaultSelector()
        self._callers: dict[socket.socket, _Caller] = {}  # the oldest first
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> None:
        """Answer for ever; an exception, such as KeyboardInterrupt, ends it."""
        while True:
            self.step(None)

    def step(self, timeout: float | None) -> None:
        """Answer what is there, or comes within `timeout` seconds; None waits for ever."""
        now = time.monotonic()
        for oldest in self._callers.values():
            left = max(0.0, oldest.deadline - now)
            timeout = left if timeout is None else min(left, timeout)
            break
        for key, _ in self._selector.select(timeout):
            caller = self._callers.get(key.fileobj)  # type: ignore[call-overload]
            if caller is not None:
                self._answer(caller)
            elif key.fileobj is self._listener:
                self._accept()
        self._drop_late()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptor is left: those who wait make room
            _log.error("accept: %s", error)
            for caller in list(self._callers.values()):
                self._drop(caller)
            return
        connection.setblocking(False)
        try:
            peer = Peer.of(connection)
        except OSError as error:
            _log.error("a caller's credentials: %s", error)
            connection.close()
            return
        caller = _Caller(connection, peer, time.monotonic() + PATIENCE)
        self._callers[connection] = caller
        self._selector.register(connection, selectors.EVENT_READ)
        if sum(other.peer.uid == peer.uid for other in self._callers.values()) > SILENT:
            reason = f"{SILENT} connections of {peer.user} wait already"
            self._refuse(caller, Refused(reason, hint="send a request on each, or close it"))

    def _answer(self, caller: _Caller) -> None:
        try:
            data, _, flags, _ = caller.connection.recvmsg(LONGEST)
            if not data:
                self._drop(caller)
                return
            if flags & socket.MSG_TRUNC:
                raise Refused(f"no request: longer than {LONGEST} bytes")
            with granted(self._policy, caller.peer, parse_request(data)) as grant:
                answer = Granted(grant.tap.name, grant.tap.created)
                self._send(caller, answer, grant.descriptors())
                _log.info("granted to %s: %s", caller.peer, grant)
        except VhostctlError as error:
            self._refuse(caller, error)
        except OSError as error:
            self._refuse(caller, kernel_error(error.errno or 0, "answer", str(caller.peer)))
        except Exception:  # noqa: BLE001 -- what nobody thought of costs its sender alone
            _log.exception("no answer to %s", caller.peer)
        self._drop(caller)

    def _refuse(self, caller: _Caller, error: VhostctlError) -> None:
        what = "refused" if isinstance(error, Refused) else "failed"
        _log.warning("%s to %s: %s", what, caller.peer, error)
        try:
            self._send(caller, denial(error), [])
        except OSError:
            _log.info("%s did not wait for the answer", caller.peer)
        self._drop(caller)

    def _send(
        self, caller: _Caller, answer: Granted | Denied | Failed, descriptors: list[int]
    ) -> None:
        socket.send_fds(caller.connection, [msgspec.json.encode(answer)], descriptors)

    def _drop_late(self) -> None:
        now = time.monotonic()
        for caller in [c for c in self._callers.values() if c.deadline <= now]:
            _log.warning("refused to %s: no request within %g s", caller.peer, PATIENCE)
            self._drop(caller)

    def _drop(self, caller: _Caller) -> None:
        if self._callers.pop(caller.connection, None) is not None:
            self._selector.unregister(caller.connection)
            caller.connection.close()

    def close(self) -> None:
        """Close every connection; a second call does nothing."""
        for caller in list(self._callers.values()):
            self._drop(caller)
        self._selector.close()
