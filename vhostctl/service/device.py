"""One device of the service: what it is to be, and its wiring while it has one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import msgspec

from vhostctl.abi import virtio
from vhostctl.control.ringstatus import RingStatus
from vhostctl.control.session import Session
from vhostctl.control.snapshot import Snapshot
from vhostctl.control.states import State
from vhostctl.errors import InvalidArgument, StateError, VhostctlError
from vhostctl.host.closing import Closing
from vhostctl.host.memory import MappedRegion
from vhostctl.jobs.up import Up
from vhostctl.service.spec import DeviceSpec, DeviceStatus, MemoryStatus, TrafficStatus
from vhostctl.service.state import Journal, StateDirectory

_ALIGNMENT = 2 << 20  # of memory whose place is ours to choose: a huge page

DeviceState = Literal["running", "stopped", "suspended", "failed"]


class Wired(Up):
    """A wiring with a guest behind it that can be changed while it runs."""

    def __init__(self, spec: DeviceSpec) -> None:
        """Plan it; nothing is opened yet. Raises InvalidArgument."""
        super().__init__(spec.wire(), spec.guest_spec(), spec.identity())
        self.snapshot: Snapshot | None = None
        """Where it stands, while it is suspended."""
        self._regions: dict[str, MappedRegion] = {}

    @property
    def session(self) -> Session:
        """QEMU's role."""
        return self._wire.session

    @property
    def mtu(self) -> int:
        """The tap's, as it was set last."""
        return self._wire.mtu

    def set_mtu(self, mtu: int) -> None:
        """Change the tap's MTU, until it is taken down."""
        self._wire.set_mtu(mtu)

    def guest_error(self) -> BaseException | None:
        """Return what ended a guest's loop; None while all of them run."""
        try:
            self.check()
        except BaseException as error:  # noqa: BLE001 -- it is asked for, not handled
            return error
        return None

    def set_pairs(self, pairs: int) -> int:
        """Have the first `pairs` take part and no others; return the frames dropped for it."""
        if not 1 <= pairs <= self.session.config.queues:
            raise InvalidArgument(
                f"{pairs} queue pairs", hint=f"use 1 to {self.session.config.queues}"
            )
        for pair in range(pairs):
            self.session.enable_pair(pair)
        others = range(self.session.config.queues - 1, pairs - 1, -1)
        return sum(self.session.disable_pair(pair).dropped for pair in others)

    def add_memory(self, name: str, size: int, gpa: int | None) -> int:
        """Map a region of `size` bytes and have the devices know it; return its gpa."""
        if not name:
            raise InvalidArgument("a memory region without a name", hint="give it one")
        memory = self.session.memory
        if gpa is None:
            end = max(region.gpa + region.size for region in memory.regions)
            gpa = -(-end // _ALIGNMENT) * _ALIGNMENT
        region = MappedRegion.anonymous(gpa, size, name)
        try:
            memory.add(region, name)
        except BaseException:
            region.close()
            raise
        self._regions[name] = region
        return gpa

    def remove_memory(self, name: str) -> None:
        """Take a region away from the devices, and unmap it."""
        self.session.memory.remove(name)
        if name in self._regions:
            self._regions.pop(name).close()

    def suspend(self) -> Snapshot:
        """Stop the rings and keep all else."""
        self.snapshot = self.session.suspend(hand_on=False)
        return self.snapshot

    def resume(self) -> None:
        """Have the rings go on where they stand, and the link as it was."""
        self.session.start()
        self.snapshot = None
        self.session.kick()

    def close(self) -> None:
        """Stop the guest, take the wiring down, unmap what was added.

        What ended the guest is not raised: it was told already.
        """
        known = self.guest_error()
        try:
            super().close()
        except BaseException as error:
            if error is not known:
                raise
        finally:
            while self._regions:
                self._regions.popitem()[1].close()


class Device(Closing):
    """A device by name. While it is stopped it holds nothing of the system."""

    def __init__(self, spec: DeviceSpec, directory: StateDirectory) -> None:
        self.spec = spec
        self.told: DeviceState = "stopped"
        """The state that was last told to the service's clients."""
        self.errors_told: list[int] = []
        """The ring errors of which they heard."""
        self._directory = directory
        self._journal: Journal | None = None
        self._wired: Wired | None = None

    @property
    def state(self) -> DeviceState:
        """How it is now."""
        if self._wired is None:
            return "stopped"
        if self._wired.session.state is State.FAILED or self._wired.guest_error() is not None:
            return "failed"
        return "running" if self._wired.snapshot is None else "suspended"

    def wired(self, call: str, *states: DeviceState) -> Wired:
        """Return the wiring for `call`, which needs one of `states`. Raises StateError."""
        state = self.state
        if self._wired is not None and state in (states or ("running", "suspended")):
            return self._wired
        remedy = {"stopped": "start it", "failed": "stop and start it", "suspended": "resume it"}
        raise StateError(
            f"{call}: device {self.spec.name!r} is {state}",
            hint=f"{remedy.get(state, 'suspend it')} first",
        )

    def start(self) -> bool:
        """Wire it; False if it is. What failed is taken down before. Raises VhostctlError."""
        if self.state == "running":
            return False
        if self.state == "suspended":
            self.wired("start", "running")
        with suppress(VhostctlError, OSError):  # what failed was told, and may fail once more
            self.stop()
        wired = Wired(self.spec)
        journal = Journal.of(self.spec)
        self._directory.write(journal)
        with self._put_back(journal):
            self._wired = wired.__enter__()
        self._journal = journal
        return True

    def stop(self) -> bool:
        """Take its wiring down; False if there is none. Raises VhostctlError."""
        wired, journal = self._wired, self._journal
        if wired is None or journal is None:
            return False
        self._wired = self._journal = None
        self.errors_told = []
        with self._put_back(journal):
            wired.close()
        self._directory.forget(journal)
        return True

    @contextmanager
    def _put_back(self, journal: Journal) -> Iterator[None]:
        """See that all is as before if the with block fails half-way."""
        try:
            yield
        except BaseException as error:
            try:
                journal.take_back()
                self._directory.forget(journal)
            except VhostctlError as second:
                error.add_note(f"{journal.tap} is not as before: {second}")
            raise

    def suspend(self) -> dict[str, Any]:
        """Stop the rings; return the snapshot as JSON data."""
        snapshot = self.wired("suspend", "running").suspend()
        data: dict[str, Any] = msgspec.to_builtins(snapshot)
        return data

    def resume(self) -> None:
        """Have the rings go on."""
        wired = self.wired("resume", "suspended")
        if wired.snapshot is not None:
            wired.resume()

    def set_mtu(self, mtu: int) -> bool:
        """Change the tap's MTU until the device stops; False if it is that."""
        wired = self.wired("set-mtu")
        if self._journal is None or wired.mtu == mtu:
            return False
        self._journal = msgspec.structs.replace(self._journal, mtu=mtu, old_mtu=wired.mtu)
        self._directory.write(self._journal)
        wired.set_mtu(mtu)
        return True

    def new_ring_errors(self) -> dict[int, int]:
        """Return how many errors each queue had since the last call, if it had any."""
        if self._wired is None:
            return {}
        before, now = self.errors_told, self._wired.ring_errors()
        self.errors_told = now
        counts = (count - old for count, old in zip(now, before or [0] * len(now), strict=True))
        return {queue: count for queue, count in enumerate(counts) if count}

    def guest_error(self) -> str | None:
        """Return what ended the guest, in words."""
        error = None if self._wired is None else self._wired.guest_error()
        return None if error is None else str(error) or type(error).__name__

    def status(self) -> DeviceStatus:
        """Return what there is to know."""
        identity = self.spec.identity()
        wired = self._wired
        session = None if wired is None else wired.session
        enabled = () if session is None else session.enabled
        return DeviceStatus(
            name=self.spec.name,
            state=self.state,
            link=session is not None and session.link,
            created=session is not None and session.tap is not None and session.tap.created,
            mac=identity.mac.hex(":"),
            ipv4=identity.ipv4,
            ipv6=identity.ipv6,
            mtu=self.spec.mtu or 1500 if wired is None else wired.mtu,
            features=() if session is None else tuple(virtio.feature_names(session.features)),
            enabled=tuple(pair for pair, on in enumerate(enabled) if on),
            memory=() if session is None else _memory(session),
            logging=session is not None and session.logging,
            busyloop=self.spec.busyloop if session is None else session.busyloop,
            rings=() if session is None else _rings(session),
            ring_errors=() if wired is None else tuple(wired.ring_errors()),
            guest_error=self.guest_error(),
            traffic=TrafficStatus(0, 0, 0, 0, 0) if wired is None else _traffic(wired),
            spec=self.spec,
        )

    def close(self) -> None:
        """Stop it; a second call does nothing."""
        self.stop()


def _memory(session: Session) -> tuple[MemoryStatus, ...]:
    return tuple(MemoryStatus(r.name, r.gpa, r.size) for r in session.memory.regions)


def _rings(session: Session) -> tuple[RingStatus, ...]:
    if session.state is State.FAILED:
        return ()
    return tuple(session.ring_status())


def _traffic(wired: Wired) -> TrafficStatus:
    now = wired.traffic()
    return TrafficStatus(now.rx_frames, now.rx_bytes, now.tx_frames, now.tx_bytes, now.errors)
