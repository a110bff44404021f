"""One vhost-net wiring from nothing to running and back."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Self

from vhostctl.control.bringup import prepare_steps, start_steps
from vhostctl.control.features import Negotiated
from vhostctl.control.plan import Observer, Plan, Step
from vhostctl.control.wiring import Memory, SessionConfig, VirtQueue, Wiring
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.host.closing import Closing
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import VhostNet


class State(enum.Enum):
    """How far a session is."""

    NEW = "new"
    PREPARED = "prepared"
    RUNNING = "running"
    CLOSED = "closed"


class Session(Closing):
    """A tap wired to vhost-net; a context manager that prepares on entry.

    `prepare()` opens what it was not handed and tells every device about features and
    memory. `start()` places the rings and attaches the tap; `stop()` detaches it and
    returns where each ring stands, for the next `start()`. What was handed in is used
    and left open; a device keeps us as its owner. Not synchronised: one thread at a time.
    """

    def __init__(
        self,
        config: SessionConfig | None = None,
        *,
        memory: Memory | None = None,
        tap: Tap | None = None,
        vhost: Sequence[VhostNet] = (),
        open_tap: Callable[[], Tap] | None = None,
        observe: Observer | None = None,
    ) -> None:
        """Plan the wiring; nothing is opened yet.

        `open_tap` opens the tap somewhere else (another namespace), `observe` is called
        before each step. Raises InvalidArgument if what was handed in is not one for each pair.
        """
        config = config or SessionConfig()
        for kind, count in (
            ("vhost devices", len(vhost)),
            ("tap queues", len(tap.queues if tap else ())),
        ):
            if count and count != config.queues:
                raise InvalidArgument(
                    f"{config.queues} queue pairs and {count} {kind}",
                    hint="each pair needs its own",
                )
        self.state = State.NEW
        self._wiring = Wiring(config, memory, tap, vhost, open_tap)
        self._observe = observe
        self._prepare = Plan(prepare_steps(self._wiring))
        self._start = self._start_plan([0] * 2 * config.queues)

    def _start_plan(self, bases: Sequence[int]) -> Plan:
        return Plan(start_steps(self._wiring, bases))

    @property
    def config(self) -> SessionConfig:
        """What was asked for."""
        return self._wiring.config

    @property
    def plan(self) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
        """The steps of `prepare()` and those of `start()`, in order."""
        return self._prepare.steps, self._start.steps

    @property
    def negotiated(self) -> Negotiated:
        """The outcome of negotiation; empty before `prepare()`."""
        return self._wiring.negotiated

    @property
    def features(self) -> int:
        """The acknowledged feature bits."""
        return self._wiring.negotiated.features

    def hva(self, gpa: int, length: int) -> int:
        """Return the host virtual address of [gpa, gpa + length) of guest memory.

        Raises InvalidArgument unless the range lies inside one region.
        """
        return self._wiring.table.hva(gpa, length, "memory")

    @property
    def pairs(self) -> list[tuple[VirtQueue, VirtQueue]]:
        """The (receive, transmit) rings of each pair, for the driver."""
        rings = self._wiring.queues
        return list(zip(rings[::2], rings[1::2], strict=True))

    @property
    def arena(self) -> tuple[int, int]:
        """(gpa, bytes) of guest memory that the rings leave free, for the driver."""
        return self._wiring.arena

    def prepare(self) -> None:
        """Open what is missing, take ownership, negotiate, set the memory table.

        If a step fails, those before it are undone and its error is raised.
        """
        self._expect(State.NEW)
        self._prepare.run(self._observe)
        self.state = State.PREPARED

    def start(self, bases: Sequence[int] | None = None) -> None:
        """Start every ring at its base: as `stop()` returned them, or 0.

        The driver must have written its rings before. If a step fails, the rings that
        were started are stopped again and its error is raised.
        """
        self._expect(State.PREPARED)
        bases = [0] * 2 * self.config.queues if bases is None else bases
        if len(bases) != 2 * self.config.queues:
            raise InvalidArgument(f"{len(bases)} ring bases for {2 * self.config.queues} rings")
        self._start = self._start_plan(bases)
        self._start.run(self._observe)
        self.state = State.RUNNING

    def stop(self) -> list[int]:
        """Stop every ring and return its base (VHOST_GET_VRING_BASE), pair by pair."""
        self._expect(State.RUNNING)
        self.state = State.PREPARED
        self._start.undo()
        return [device.get_vring_base(ring) for device in self._wiring.vhost for ring in (0, 1)]

    def ring_errors(self) -> list[int]:
        """Return how often each ring was found malformed since the last call."""
        return [queue.error.drain() for queue in self._wiring.queues]

    def close(self) -> None:
        """Stop and close what this session opened; a second call does nothing."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        try:
            self._start.undo()
        finally:
            self._prepare.undo()

    def _expect(self, state: State) -> None:
        if self.state is not state:
            raise StateError(f"the session is {self.state.value}", hint=f"it must be {state.value}")

    def __enter__(self) -> Self:
        if self.state is State.NEW:
            self.prepare()
        return self
