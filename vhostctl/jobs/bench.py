"""The driver at full speed through a device, and what each frame costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from vhostctl.control.netsetup import LinkSettings
from vhostctl.control.wiring import SessionConfig
from vhostctl.errors import CheckFailed, EnvironmentMissing, InvalidArgument
from vhostctl.guest.config import QueueStats
from vhostctl.guest.driver import QueuePair
from vhostctl.guest.pump import Sink, Transmitter
from vhostctl.host import worker
from vhostctl.host.pktgen import PacketGenerator, generator_threads
from vhostctl.jobs.running import Running
from vhostctl.jobs.wire import ETHERNET_HEADER, Wire, WireConfig

GUEST_MAC = "02:00:00:00:00:02"
_ELSEWHERE = bytes.fromhex("020000000003")  # not the tap's: the host drops it early
_MIN_FRAME = 60
_WARM_UP = 0.2
_TICK = 0.2


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One direction: frames and bytes in `seconds`, CPU time in ns of each party.

    `all_ns` is the whole machine's, without the kernel's packet generator if it was the
    sender.
    """

    direction: str
    seconds: float
    frames: int
    bytes: int
    driver_ns: int
    worker_ns: int
    all_ns: int
    kicks: int
    calls: int

    def per_frame(self, nanoseconds: int) -> float:
        """Return `nanoseconds` for each frame, or 0 if there was none."""
        return nanoseconds / self.frames if self.frames else 0.0


def template(size: int) -> bytes:
    """Return a UDP frame of `size` bytes that is for nobody on the host."""
    if not _MIN_FRAME <= size <= 65535:
        raise InvalidArgument(f"frame of {size} bytes", hint=f"use {_MIN_FRAME} to 65535")
    ethernet = _ELSEWHERE + bytes.fromhex(GUEST_MAC.replace(":", "")) + b"\x08\x00"
    length = size - len(ethernet)
    ip = bytearray.fromhex("45000000000000004011000bc6336402c6336401")
    ip[2:4] = length.to_bytes(2, "big")
    udp = (9).to_bytes(2, "big") * 2 + (length - 20).to_bytes(2, "big") + b"\0\0"
    return (ethernet + bytes(ip) + udp).ljust(size, b"\0")


def bench(
    session: SessionConfig,
    direction: str,
    frame: int,
    seconds: float,
    progress: Callable[[float], None] = lambda _: None,
) -> BenchResult:
    """Drive one pair in `direction` ("tx": out of the guest, or "rx") for `seconds`.

    The worker runs as SCHED_BATCH, so that where it shares a CPU with the sender it is not
    switched to for every frame. `progress` is called with the seconds since its last call.
    Under an instruction-counted clock the nanoseconds are instructions. Raises
    EnvironmentMissing ("rx" needs pktgen).
    """
    outgoing = template(frame)
    if seconds <= 0:
        raise InvalidArgument(f"{seconds:g} seconds", hint="run for a while")
    generators = generator_threads()
    workers = worker.workers()
    config = WireConfig(session, LinkSettings(mtu=max(1500, frame - ETHERNET_HEADER)))
    with ExitStack() as stack:
        wire = stack.enter_context(Wire(config))
        served = worker.workers() - workers
        if not served:
            raise EnvironmentMissing(
                "no vhost worker was found", hint="run outside of a PID namespace"
            )
        for found in served:
            worker.schedule_as_batch(found)
        tids = [found.tid for found in served]
        pair = wire.driver.pairs[0]
        loop: Transmitter | Sink
        senders: set[int] = set()
        if direction == "tx":
            loop = stack.enter_context(Transmitter(pair, outgoing))
        else:
            loop = stack.enter_context(Sink(pair))
        with Running(loop, "vhostctl-bench") as running:
            if direction == "rx" and wire.namespace is not None:
                generator = PacketGenerator(wire.namespace, session.tap, frame, GUEST_MAC)
                stack.enter_context(generator)
                senders = generator_threads() - generators
            _let_run(_WARM_UP, lambda _: None)
            before = _Snapshot.take(pair, running.tid, tids, senders)
            _let_run(seconds, progress)
            running.check()
            result = before.until(_Snapshot.take(pair, running.tid, tids, senders), direction)
    if not result.frames:
        raise CheckFailed(f"not one frame went through ({direction})")
    return result


def _let_run(seconds: float, progress: Callable[[float], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        nap = min(left, _TICK)
        time.sleep(nap)
        progress(nap)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    time_ns: int
    driver_ns: int
    worker_ns: int
    sender_ns: int
    machine_ns: int
    stats: QueueStats

    @classmethod
    def take(cls, pair: QueuePair, driver: int, tids: list[int], senders: set[int]) -> Self:
        return cls(
            time_ns=time.monotonic_ns(),
            driver_ns=worker.cpu_ns(driver),
            worker_ns=sum(worker.cpu_ns(tid) for tid in tids),
            sender_ns=sum(worker.cpu_ns(tid) for tid in senders),
            machine_ns=worker.machine_cpu_ns(),
            stats=pair.stats(),
        )

    def until(self, end: _Snapshot, direction: str) -> BenchResult:
        def rise(counter: str) -> int:
            name = f"{direction}_{counter}"
            return int(getattr(end.stats, name)) - int(getattr(self.stats, name))

        return BenchResult(
            direction=direction,
            seconds=(end.time_ns - self.time_ns) / 1e9,
            frames=rise("completed" if direction == "tx" else "frames"),
            bytes=rise("bytes"),
            driver_ns=end.driver_ns - self.driver_ns,
            worker_ns=end.worker_ns - self.worker_ns,
            all_ns=end.machine_ns - self.machine_ns - (end.sender_ns - self.sender_ns),
            kicks=rise("kicks"),
            calls=rise("calls"),
        )
