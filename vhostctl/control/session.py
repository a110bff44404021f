"""One vhost-net wiring from nothing to running, what is changed of it, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Self

from vhostctl.control import bringup, changes
from vhostctl.control.addressspace import AddressSpace
from vhostctl.control.dirtylog import DirtyPages
from vhostctl.control.features import NegotiationResult
from vhostctl.control.iotlb import Iotlb
from vhostctl.control.iovamap import IovaMap
from vhostctl.control.multiqueue import Disabled, QueuePairs
from vhostctl.control.pair import RINGS, VhostPair
from vhostctl.control.plan import Observer, Plan, Step
from vhostctl.control.rings import RingPlacement, VirtQueue
from vhostctl.control.snapshot import Snapshot, take
from vhostctl.control.states import CALLS, State, check
from vhostctl.control.wiring import Handed, Memory, SessionConfig, Wiring
from vhostctl.errors import InvalidArgument, StateError
from vhostctl.host.closing import Closing
from vhostctl.host.eventfd import EventFd
from vhostctl.host.tap import Tap
from vhostctl.host.vhost import DEFAULT_PATH, VhostNet

_PREPARE = ("open", "own", "negotiate", "map")


class Session(Closing):
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
        self.state = State.NEW
        self.link = True
        """Whether the backends are attached while the session runs."""
        self._wiring = Wiring(config, handed, open_tap)
        self._observe = observe
        self._bases = [0] * 2 * config.queues
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
        session._bases = [ring.base for ring in snapshot.rings]
        session._wiring.order[:] = snapshot.order
        session._wiring.masked = {i: r.pending for i, r in enumerate(snapshot.rings) if r.masked}
        return session

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
        return self._wiring.tap

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

    def _run(self, call: str, plan: Plan | None = None) -> None:
        """Take the steps of `call`, if it may come now; it leads to its state."""
        check(self.state, call)
        plan = plan or self._phases[call]
        try:
            plan.run(self._observe)
        except BaseException:
            if plan.broken:
                self.state = State.FAILED
            raise
        self.state = CALLS[call].leads_to or self.state

    def open(self) -> None:
        """Map memory, place the rings, open tap and devices, as far as they are not handed in."""
        self._run("open")

    def own(self) -> None:
        """Become the owner of every device; from then on each has its worker."""
        self._run("own")

    def negotiate(self) -> None:
        """Settle the features, and tell tap and devices."""
        self._run("negotiate")

    def map(self) -> None:
        """Set the memory table of every device, now and whenever memory changes."""
        self._run("map")

    def prepare(self) -> None:
        """`open()`, `own()`, `negotiate()`, `map()`: if a step fails, all is taken back."""
        check(self.state, "prepare")
        try:
            for call in _PREPARE:
                self._run(call)
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
        self._run("set_rings")

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
        self._run("start")
        self.link = True

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
        return take(self._wiring, self._bases, link=self.link)

    def suspend(self, patience: float = 5.0) -> Snapshot:
        """Stop, and return what another session needs to go on: see `resume()`.

        A device that reads frames ahead of its ring gets `patience` seconds to deliver
        them; what is left of them then is lost, and counted in the snapshot.
        """
        check(self.state, "suspend")
        undelivered = 0
        if self.state is State.RUNNING:
            undelivered = changes.settle(self._wiring, patience)
            self.stop()
        return take(self._wiring, self._bases, link=self.link, undelivered=undelivered)

    def ring_errors(self) -> list[int]:
        """Return how often each ring was found malformed since the last call."""
        return [queue.error.drain() for queue in self.queues]

    def set_link(self, up: bool) -> None:
        """Take the link down (no backend: frames wait where they are), or up again."""
        check(self.state, "set_link")
        if up != self.link:
            steps = changes.link_up_steps if up else changes.link_down_steps
            self._run("set_link", Plan(steps(self._wiring)))
            self.link = up

    def enable_pair(self, pair: int) -> None:
        """Let a pair take part again, where its rings stopped. Raises as `disable_pair()`."""
        self._queue_pairs("enable_pair").enable(pair)

    def disable_pair(self, pair: int, timeout: float = 1.0) -> Disabled:
        """Let a pair take part no longer: its flows go to the others, then its rings stop.

        What the guest has no buffers for within `timeout` seconds is dropped and counted in
        what is returned. Raises InvalidArgument (no such pair, the last one), KernelError, and
        StateError while the link is down.
        """
        return self._queue_pairs("disable_pair").disable(pair, timeout)

    def _queue_pairs(self, call: str) -> QueuePairs:
        check(self.state, call)
        tap = self.tap
        if tap is None or not self.link:
            raise StateError(f"{call}(): the link is down", hint="call set_link(True) first")
        return QueuePairs(self.devices, tap.queues, self._wiring.order)

    def replace_tap(self, tap: Tap) -> None:
        """Move every ring to the queues of `tap`, which stays the caller's.

        The tap before is closed if this session opened it. Raises InvalidArgument (number
        of queues) and KernelError.
        """
        check(self.state, "replace_tap")
        self._run("replace_tap", Plan(changes.replace_tap_steps(self._wiring, tap)))

    def stop_ring(self, queue: int) -> int:
        """Stop the virtqueue `queue` alone and return its base (VIRTIO_F_RING_RESET)."""
        check(self.state, "stop_ring")
        self._run("stop_ring", Plan(changes.stop_ring_steps(self._wiring, queue)))
        pair, ring = changes.find(self._wiring, queue)
        return pair.base(ring)

    def start_ring(self, queue: int, base: int = 0, place: RingPlacement | None = None) -> None:
        """Start a virtqueue that was stopped alone, at `place` if it is to lie elsewhere."""
        check(self.state, "start_ring")
        self._run("start_ring", Plan(changes.start_ring_steps(self._wiring, queue, base, place)))

    def mask(self, queue: int) -> None:
        """Keep the calls of the virtqueue `queue` from the guest."""
        check(self.state, "mask")
        pair, ring = changes.find(self._wiring, queue)
        pair.calls[ring].mask()

    def unmask(self, queue: int) -> None:
        """Let the calls through again; what came meanwhile arrives as one."""
        check(self.state, "unmask")
        pair, ring = changes.find(self._wiring, queue)
        pair.calls[ring].unmask()

    def set_busyloop(self, microseconds: int) -> None:
        """Let every worker poll for so long before it sleeps; 0: not at all."""
        check(self.state, "set_busyloop")
        for pair in self.devices:
            for ring in RINGS:
                pair.set_busyloop(ring, microseconds)
        self._wiring.busyloop = microseconds

    def start_log(self) -> None:
        """Log from now on which pages the devices write (VHOST_F_LOG_ALL)."""
        check(self.state, "start_log")
        self._wiring.log.start()

    def sync_log(self) -> DirtyPages:
        """Return the pages written since the last call, or since `start_log()`."""
        check(self.state, "sync_log")
        return self._wiring.log.sync()

    def stop_log(self) -> DirtyPages:
        """Log no longer; return the pages written since the last `sync_log()`."""
        check(self.state, "stop_log")
        return self._wiring.log.stop()

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
        if self.state is State.NEW:
            self.prepare()
        return self
