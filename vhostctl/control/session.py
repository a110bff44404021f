"""One vhost-net wiring from nothing to running, what is changed of it, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

from vhostctl.control import bringup, changes
from vhostctl.control.addressspace import AddressSpace
from vhostctl.control.features import NegotiationResult
from vhostctl.control.iotlb import Iotlb
from vhostctl.control.iovamap import IovaMap
from vhostctl.control.live import LiveSession
from vhostctl.control.pair import RINGS, VhostPair
from vhostctl.control.plan import Observer, Plan, Step
from vhostctl.control.rings import RingPlacement, VirtQueue
from vhostctl.control.snapshot import Snapshot, bring_back, take
from vhostctl.control.states import State, check
from vhostctl.control.wiring import Handed, Memory, SessionConfig, Wiring
from vhostctl.errors import InvalidArgument
from vhostctl.host.eventfd import EventFd
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import DEFAULT_PATH, VhostNet

T = TypeVar("T")

_PREPARE = ("open", "own", "negotiate", "map")


class Session(LiveSession):
    """A tap wired to vhost-net; a context manager that prepares on entry.

    `prepare()` opens what it was not handed and tells every device about features and
    memory; it is `open()`, `own()`, `negotiate()` and `map()` in one. `start()` sets the
    rings and attaches the tap; `stop()` detaches it and returns where each ring stands.
    control/states.py has the order; a call out of it raises StateError, which names the
    right one. A call that fails is taken back; if that fails too, the session is FAILED.

    What was handed in is used and left open; a device keeps us as its owner. Not
    synchronised: one thread at a time.
    """

    def __init__(
        self,
        config: SessionConfig | None = None,
        *,
        memory: Memory | AddressSpace | None = None,
        tap: Tap | None = None,
        vhost: Sequence[VhostNet] = (),
        events: Sequence[dict[str, EventFd]] = (),
        rings: Sequence[RingPlacement] = (),
        mappings: IovaMap | None = None,
        open_tap: Callable[[], Tap] | None = None,
        observe: Observer | None = None,
    ) -> None:
        """Plan the wiring; nothing is opened yet.

        `events` are eventfds of each ring in virtqueue order, by name (``kick``, ``call``,
        ``error``), `rings` where the rings lie already, `mappings` what a translating device
        sees of memory (without it, I/O virtual addresses are guest physical ones). `open_tap`
        opens the tap somewhere else (another namespace), `observe` is called before each step.
        Raises InvalidArgument if what was handed in is not one for each pair.
        """
        config = config or SessionConfig()
        if memory is not None and not isinstance(memory, AddressSpace):
            memory = AddressSpace(memory.regions)
        handed = Handed(memory, tap, tuple(vhost), tuple(events), tuple(rings), mappings)
        handed.check(config.queues)
        super().__init__(Wiring(config, handed, open_tap), observe)
        self._bases = [0] * 2 * config.queues
        self._document: Snapshot | None = None
        self._phases = {
            "open": Plan(bringup.open_steps(self._wiring)),
            "own": Plan(bringup.own_steps(self._wiring)),
            "negotiate": Plan(bringup.negotiate_steps(self._wiring)),
            "map": Plan(bringup.map_steps(self._wiring)),
            "set_rings": Plan(bringup.ring_steps(self._wiring, self._bases)),
            "start": Plan(bringup.start_steps(self._wiring)),
        }

    @classmethod
    def resume(
        cls,
        snapshot: Snapshot,
        device: str = DEFAULT_PATH,
        *,
        memory: AddressSpace,
        tap: Tap | None = None,
        vhost: Sequence[VhostNet] = (),
        events: Sequence[dict[str, EventFd]] = (),
        mappings: IovaMap | None = None,
        open_tap: Callable[[], Tap] | None = None,
        observe: Observer | None = None,
    ) -> Self:
        """Return a session that goes on, at `start()`, where another was suspended.

        `memory` holds what the other's held, at the same guest physical addresses; the rest
        is as for a new session. The device must offer the very features that were
        acknowledged, else `negotiate()` raises NegotiationError. Raises InvalidArgument if
        memory is missing.
        """
        for region in snapshot.memory:
            memory.hva(region.gpa, region.size, f"memory region {region.name!r}")
        session = cls(
            snapshot.config(device),
            memory=memory,
            tap=tap,
            vhost=vhost,
            events=events,
            rings=[ring.placement for ring in snapshot.rings],
            mappings=mappings,
            open_tap=open_tap,
            observe=observe,
        )
        session.catch_up(snapshot)
        return session

    def catch_up(self, snapshot: Snapshot) -> None:
        """Take over what changed since the snapshot from which this session was resumed.

        Raises InvalidArgument if it is of other rings or features.
        """
        check(self.state, "catch_up")
        first = self._document or snapshot
        if (snapshot.features, len(snapshot.rings)) != (first.features, 2 * self.config.queues):
            raise InvalidArgument("a snapshot of another session", hint="resume() from it")
        self._document = snapshot
        self._bases = [ring.base for ring in snapshot.rings]
        bring_back(self._wiring, snapshot)

    @property
    def config(self) -> SessionConfig:
        """What was asked for."""
        return self._wiring.config

    @property
    def plan(self) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
        """The steps of `prepare()` and those of `start()`, in order."""
        steps = {call: plan.steps for call, plan in self._phases.items()}
        prepare = sum((steps[call] for call in _PREPARE), ())
        return prepare, steps["set_rings"] + steps["start"]

    @property
    def negotiated(self) -> NegotiationResult:
        """The outcome of negotiation; empty before `negotiate()`."""
        return self._wiring.negotiated

    @property
    def features(self) -> int:
        """The acknowledged feature bits."""
        return self._wiring.negotiated.features

    @property
    def memory(self) -> AddressSpace:
        """Guest memory; what is added to it or removed, every device hears of."""
        return self._wiring.memory

    @property
    def devices(self) -> Sequence[VhostPair]:
        """The vhost device of each pair."""
        return tuple(self._wiring.pairs)

    @property
    def tap(self) -> Tap | None:
        """The tap that the rings are attached to, or will be."""
        return self._wiring.side.tap

    @property
    def enabled(self) -> Sequence[bool]:
        """Which pairs are enabled."""
        return tuple(map(self._wiring.enabled, range(self.config.queues)))

    @property
    def iotlb(self) -> Iotlb | None:
        """Who answers the misses of a translating session: poll it or give it a thread."""
        return self._wiring.iotlb

    def hva(self, gpa: int, length: int) -> int:
        """Return the host virtual address of [gpa, gpa + length) of guest memory.

        Raises InvalidArgument unless the range lies inside one region.
        """
        return self.memory.hva(gpa, length, "memory")

    @property
    def queues(self) -> Sequence[VirtQueue]:
        """Every ring in virtqueue order: receive and transmit of pair 0, of pair 1..."""
        return tuple(self._wiring.queues)

    @property
    def pairs(self) -> list[tuple[VirtQueue, VirtQueue]]:
        """The (receive, transmit) rings of each pair, for the driver."""
        return list(zip(self.queues[::2], self.queues[1::2], strict=True))

    @property
    def arena(self) -> tuple[int, int]:
        """(gpa, bytes) of the first region that the rings leave free, for the driver."""
        return self._wiring.arena

    def open(self) -> None:
        """Map memory, place the rings, open tap and devices, as far as they are not handed in."""
        self._run("open", self._phases["open"])
        if self._document is not None:
            bring_back(self._wiring, self._document)

    def own(self) -> None:
        """Become the owner of every device; from then on each has its worker."""
        self._run("own", self._phases["own"])

    def negotiate(self) -> None:
        """Settle the features, and tell tap and devices."""
        self._run("negotiate", self._phases["negotiate"])

    def map(self) -> None:
        """Set the memory table of every device, now and whenever memory changes."""
        self._run("map", self._phases["map"])

    def prepare(self) -> None:
        """`open()`, `own()`, `negotiate()`, `map()`: if a step fails, all is taken back."""
        check(self.state, "prepare")
        try:
            self.open()
            self.own()
            self.negotiate()
            self.map()
        except BaseException as error:
            self.state = State.FAILED
            try:
                self._undo(*_PREPARE)
                self.state = State.NEW
            except BaseException as second:  # noqa: BLE001 -- the first error is the one to report
                error.add_note(f"while undoing: {second}")
            raise

    def _undo(self, *calls: str) -> None:
        with contextlib.ExitStack() as stack:
            for call in calls:
                stack.callback(self._phases[call].undo)

    def set_rings(self, bases: Sequence[int] | None = None) -> None:
        """Tell every device where its rings lie, where they stand, and their eventfds.

        `bases` is where each ring starts, as `stop()` returned it; without it where it
        stopped last, or 0. Raises InvalidArgument, KernelError.
        """
        check(self.state, "set_rings")
        if bases is not None and len(bases) != len(self._bases):
            raise InvalidArgument(f"{len(bases)} ring bases for {len(self._bases)} rings")
        self._bases = list(self._bases if bases is None else bases)
        self._phases["set_rings"] = Plan(bringup.ring_steps(self._wiring, self._bases))
        self._run("set_rings", self._phases["set_rings"])

    def start(self, bases: Sequence[int] | None = None) -> None:
        """Attach the tap to every ring of the enabled pairs; `set_rings(bases)` if need be.

        The driver must have written its rings before. If a step fails, the rings that
        were started are stopped again and its error is raised.
        """
        check(self.state, "start")
        if self.state is not State.RINGS_SET:
            self.set_rings(bases)
        elif bases is not None:
            raise InvalidArgument("bases for rings that are set", hint="give them to set_rings()")
        self._wiring.side.handed_on = False
        self._run("start", self._phases["start"])

    def stop(self) -> list[int]:
        """Stop every ring and return its base (VHOST_GET_VRING_BASE), pair by pair."""
        check(self.state, "stop")
        self.state = State.FAILED  # unless all of it can be done
        self._phases["start"].undo()
        self._bases = [pair.base(ring) for pair in self.devices for ring in RINGS]
        self.state = State.STOPPED
        return list(self._bases)

    def snapshot(self) -> Snapshot:
        """Return the document of `suspend()` without stopping: bases are those of the last stop.

        Another session can be prepared from it, while this one runs, and started where
        `suspend()` then says that the rings stand.
        """
        check(self.state, "snapshot")
        return take(self._wiring, self._bases)

    def suspend(self, patience: float = 5.0, *, hand_on: bool = True) -> Snapshot:
        """Stop, and return what another session needs to go on: see `resume()`.

        Devices that read frames ahead of their rings have `patience` seconds to deliver
        them; what is left of them then is lost, and counted in the snapshot. With `hand_on`
        the tap stays as it is, for whoever goes on, when this session closes.
        """
        check(self.state, "suspend")
        undelivered = changes.settle(self._wiring, patience)
        if self.state is State.RUNNING:
            self.stop()
        self._wiring.side.handed_on = hand_on
        return take(self._wiring, self._bases, undelivered)

    def close(self) -> None:
        """Stop and close what this session opened; a second call does nothing."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        with contextlib.ExitStack() as stack:
            stack.callback(self._undo, *_PREPARE)
            stack.callback(self._wiring.log.close)
            stack.callback(self._undo, "start")

    def __enter__(self) -> Self:
        if self.state in (State.NEW, State.CLOSED):
            self.prepare()
        return self
