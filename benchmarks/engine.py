"""The embedded engine against a bare loop of write(2) and read(2) on the same tap.

Run as root on a quiet machine: python benchmarks/engine.py [SECONDS [ROUNDS]]. Engine and
loop take turns, and what counts is the median of the rounds' ratios. The engine shares the
machine with the driver that feeds it; the loop has it for itself.
"""

from __future__ import annotations

import ctypes
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vhostctl import GuestMemory, NetDriver, Session, Tap, VhostNet
from vhostctl.guest.driver import QueuePair
from vhostctl.guest.pump import Sink, Transmitter
from vhostctl.host import netns
from vhostctl.jobs.bench import template
from vhostctl.jobs.running import Running, Stoppable

FRAME = template(64)
BARE = Path(__file__).with_name("bare.c")


def bare_library(folder: str) -> ctypes.CDLL:
    path = f"{folder}/bare.so"
    compiler = ["cc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]
    subprocess.run([*compiler, str(BARE), "-o", path], check=True)
    library = ctypes.CDLL(path)
    library.bare_write.restype = library.bare_read.restype = ctypes.c_double
    return library


def engine_rate(loop: Stoppable, counted: Callable[[], int], seconds: float) -> float:
    with Running(loop, "driver"):
        time.sleep(0.05)
        start, frames = time.monotonic(), counted()
        time.sleep(seconds)
        return (counted() - frames) / (time.monotonic() - start)


@contextmanager
def flooded(library: ctypes.CDLL, interface: str) -> Iterator[None]:
    index = socket.if_nametoindex(interface)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        argument = (sender.fileno(), index, FRAME, ctypes.c_size_t(len(FRAME)))
        thread = threading.Thread(target=library.flood, args=argument)
        thread.start()
        try:
            time.sleep(0.05)
            yield
        finally:
            library.flood_end()
            thread.join()


class Contest:
    """The two sides, on one tap."""

    def __init__(
        self, library: ctypes.CDLL, session: Session, tap: Tap, pair: QueuePair, seconds: float
    ) -> None:
        self._library, self._session, self._tap = library, session, tap
        self._pair, self._seconds = pair, seconds

    def bare(self, name: str, *argument: object) -> float:
        """The loop, while no ring is attached to the tap."""
        bases = self._session.stop()
        rate: float = getattr(self._library, name)(
            self._tap.queues[0].fileno(), *argument, ctypes.c_double(self._seconds)
        )
        self._session.start(bases)
        self._pair.start()
        return rate

    def out(self) -> tuple[float, float]:
        packet = bytes(self._tap.queues[0].vnet_hdr_size()) + FRAME
        loop = Transmitter(self._pair, FRAME)
        ours = engine_rate(loop, lambda: self._pair.stats().tx_completed, self._seconds)
        return ours, self.bare("bare_write", packet, ctypes.c_size_t(len(packet)))

    def into(self) -> tuple[float, float]:
        with flooded(self._library, "tap0"):
            loop = Sink(self._pair)
            ours = engine_rate(loop, lambda: self._pair.stats().rx_frames, self._seconds)
            return ours, self.bare("bare_read")


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    netns.unshare()
    with (
        tempfile.TemporaryDirectory() as folder,
        GuestMemory.anonymous(8 << 20) as memory,
        Tap.open("tap0") as tap,
        VhostNet.embedded() as device,
        Session(memory=memory, tap=tap, vhost=[device]) as session,
        NetDriver(session, session.pairs, session.features, session.arena) as driver,
    ):
        Path("/proc/sys/net/ipv6/conf/tap0/disable_ipv6").write_text("1", encoding="ascii")
        subprocess.run(["ip", "link", "set", "tap0", "up"], check=True)
        session.start()
        driver.pairs[0].start()
        contest = Contest(bare_library(folder), session, tap, driver.pairs[0], seconds)
        for name, turn in (("out of the guest", contest.out), ("into the guest", contest.into)):
            pairs = [turn() for _ in range(rounds)]
            ours, bare = (statistics.median(rates) for rates in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"{name}: engine {ours:,.0f}, bare loop {bare:,.0f} frames/s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
