"""A process that serves a suspended session's rings on a device of its own, until told to stop.

`Migrant` is the caller's end. The other is this module, run as a program with the descriptor
of its end of a socket pair: first it gets a snapshot, memory, tap queues and eventfds, then
one request at a time. It ends when the caller's end is closed.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from vhostctl.control.addressspace import AddressSpace
from vhostctl.control.session import Session
from vhostctl.control.snapshot import Snapshot
from vhostctl.control.wiring import EVENTS
from vhostctl.errors import CheckFailed, InvalidArgument, VhostctlError
from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd
from vhostctl.host.memory import MappedRegion
from vhostctl.host.tap import Tap, TapQueue

_MOST = 253  # SCM_MAX_FD of include/net/scm.h: descriptors in one message
_LONGEST = 1 << 17  # bytes of a message
_PATIENCE = 120.0  # seconds for an answer; an emulated machine starts an interpreter in some


@dataclass(frozen=True, slots=True)
class Possessions:
    """Descriptors that a session stands on: of memory regions, tap queues, rings' eventfds."""

    memory: tuple[int, ...]
    tap: tuple[int, ...]
    events: tuple[int, ...]

    @classmethod
    def of(cls, session: Session) -> Possessions:
        """Return those of `session`, which stay its own.

        Raises InvalidArgument if another process cannot have its memory, or not all at once.
        """
        if session.tap is None:
            raise InvalidArgument("the session has no tap", hint="prepare it first")
        regions = [region.source for region in session.memory.regions]
        shared = [region for region in regions if isinstance(region, MappedRegion)]
        if len(shared) != len(regions):
            raise InvalidArgument("guest memory is not shared", hint="use MappedRegion.memfd()")
        found = cls(
            tuple(region.fileno() for region in shared),
            tuple(queue.fileno() for queue in session.tap.queues),
            tuple(queue.events[name].fileno() for queue in session.queues for name in EVENTS),
        )
        if len(found.all()) > _MOST:
            raise InvalidArgument(
                f"{len(found.all())} descriptors to hand over", hint=f"at most {_MOST} can be"
            )
        return found

    def all(self) -> list[int]:
        """Return them in the order in which they are sent."""
        return [*self.memory, *self.tap, *self.events]


class Migrant(Closing):
    """Another process with a session that is prepared, and started and suspended on request.

    Every method raises CheckFailed with what the other process has to say, or that it says
    nothing any more.
    """

    def __init__(self, snapshot: Snapshot, device: str, possessions: Possessions) -> None:
        """Start the process and have it prepare a session on `device`."""
        self._stack = ExitStack()
        self._label = f"process for {device}"
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket = self._stack.enter_context(ours)
            self._socket.settimeout(_PATIENCE)
            with theirs:
                # The socket is closed first, last in and first out: then the process ends.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    process_group=0,  # ctrl-C at a terminal is for the caller
                )
            self._stack.callback(self._end)
            request = {"device": device, "snapshot": snapshot.to_json()}
            data = json.dumps(request).encode()
            socket.send_fds(self._socket, [data], possessions.all())
            self._answer()
        except BaseException:
            self.close()
            raise

    def start(self, snapshot: Snapshot) -> int:
        """Start the rings where `snapshot` has them; return when they ran (monotonic ns)."""
        return int(self._ask({"start": snapshot.to_json()})["at"])

    def suspend(self) -> tuple[int, Snapshot]:
        """Stop the rings; return when that began (monotonic ns), and where they stand."""
        answer = self._ask({"suspend": True})
        return int(answer["at"]), Snapshot.from_json(answer["snapshot"])

    def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        try:
            self._socket.send(json.dumps(request).encode())
        except OSError as error:
            raise CheckFailed(f"{self._label} has ended: {error.strerror}") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            data = self._socket.recv(_LONGEST)
        except OSError as error:
            raise CheckFailed(f"{self._label} does not answer: {error}") from error
        answer: dict[str, Any] = json.loads(data) if data else {"error": "it ended"}
        if "error" in answer:
            raise CheckFailed(f"{self._label}: {answer['error']}")
        return answer

    def _end(self) -> None:
        self._socket.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise CheckFailed(f"{self._label} had to be killed") from error
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()

    def close(self) -> None:
        """End the process, and so its session; a second call does nothing."""
        self._stack.close()


def serve(sock: socket.socket) -> None:
    """Be the other process: take over what comes, and do what is asked until nobody asks."""
    data, descriptors, _, _ = socket.recv_fds(sock, _LONGEST, _MOST)
    if not data:
        return
    request = json.loads(data)
    with ExitStack() as stack:
        snapshot = Snapshot.from_json(request["snapshot"])
        session = _take_over(stack, snapshot, request["device"], list(descriptors))
        _say(sock)
        while data := sock.recv(_LONGEST):
            request = json.loads(data)
            if "start" in request:
                session.catch_up(Snapshot.from_json(request["start"]))
                session.start()
                _say(sock, at=time.monotonic_ns())
            else:
                at = time.monotonic_ns()
                _say(sock, snapshot=session.suspend().to_json(), at=at)


def _say(sock: socket.socket, **answer: object) -> None:
    sock.send(json.dumps(answer).encode())


def _take_over(stack: ExitStack, snapshot: Snapshot, device: str, fds: list[int]) -> Session:
    take = iter(fds)
    memory = AddressSpace()
    with memory.transaction():
        for region in snapshot.memory:
            fd = next(take)
            mapped = MappedRegion.from_fd(region.gpa, region.size, fd, name=region.name)
            stack.enter_context(mapped)
            memory.add(mapped)
    pairs = len(snapshot.rings) // 2
    queues = [
        stack.enter_context(TapQueue.adopt(next(take), f"{snapshot.tap.name} queue {index}"))
        for index in range(pairs)
    ]
    events = [
        {
            name: stack.enter_context(EventFd.adopt(next(take), f"{name} of queue {index}"))
            for name in EVENTS
        }
        for index in range(2 * pairs)
    ]
    tap = Tap(snapshot.tap.name, queues, created=False)
    session = Session.resume(snapshot, device, memory=memory, tap=tap, events=events)
    return stack.enter_context(session)


def main() -> None:
    """Serve on the descriptor that the command line names."""
    # A caller that is gone is told nothing.
    with socket.socket(fileno=int(sys.argv[1])) as sock, suppress(ConnectionError):
        try:
            serve(sock)
        except (VhostctlError, OSError) as error:
            _say(sock, error=str(error))


if __name__ == "__main__":
    main()
