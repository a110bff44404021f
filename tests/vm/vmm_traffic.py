"""Run inside a lab VM: what goes between a guest of `vhostctl vmm` and the host, and how."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Self

from tests.vm.tcp_qemu import ANSWER, GUEST
from tests.vm.vmm_machine import HOST, TAP, Guest, until
from vhostctl.jobs import hosttraffic
from vhostctl.jobs.hosttraffic import HostSockets

GUEST_SCRIPT = Path(__file__).with_name("vmm_guest.sh")
ECHO = 7004  # the guest's port that says what it is told
_ETH_P_ARP = 0x0806  # linux/if_ether.h
_VERSION_1 = 32  # linux/virtio_config.h
_BLOCK = bytes(range(256)) * 64
_PAUSE = 0.05  # seconds between two rounds, for what else the guest has to do


class Conversation:
    """A TCP connection to the guest over which blocks go there and back all the time."""

    def __init__(self) -> None:
        self.rounds = 0
        self.trouble: str | None = None
        self._socket = socket.create_connection((GUEST, ECHO), timeout=ANSWER)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(ANSWER)
        self._socket.close()

    def _talk(self) -> None:
        try:
            while not self._over.wait(_PAUSE):
                sent = _BLOCK[self.rounds % 256 :]
                self._socket.sendall(sent)
                got = bytearray()
                while len(got) < len(sent):
                    part = self._socket.recv(len(sent) - len(got))
                    if not part:
                        raise ConnectionError("the guest closed it")
                    got += part
                if got != sent:
                    raise ConnectionError("what came back is not what was sent")
                self.rounds += 1
        except OSError as error:
            if self._over.is_set():
                return
            self.trouble = f"after {self.rounds} rounds: {error}"

    def goes_on(self, more: int = 3) -> int:
        """Wait for some rounds more, and return how many there were. Raises AssertionError."""
        least = self.rounds + more
        until(lambda: self.rounds >= least or self.trouble, "the conversation")
        assert self.trouble is None, self.trouble
        return self.rounds


@contextmanager
def announcement() -> Iterator[None]:
    """Have the guest say in the block where it is: an ARP packet of its own about itself."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as sock:
        sock.bind((TAP, _ETH_P_ARP))
        yield
        sock.settimeout(ANSWER)
        mine = bytes(map(int, GUEST.split(".")))
        packet = bytes(28)
        while packet[14:18] + packet[24:28] != mine + mine:  # sender's and target's address
            packet = sock.recv(28)


def pings(*sizes: int) -> int:
    """Return how many pings of these sizes the guest answered."""
    hosttraffic.PATIENCE = ANSWER
    return HostSockets(lambda function: function()).ping(4, GUEST, list(sizes))


def from_host() -> None:
    answered = pings(56, 1400, 4000)
    assert answered == 3, f"the guest answered {answered} of 3 pings"


def from_guest(guest: Guest) -> None:
    # One at a time: busybox waits a second or two for the last of several, whatever -w says.
    guest.console.check(" && ".join([f"ping -c 1 -W {ANSWER} {HOST}"] * 3), 3 * ANSWER)


def interrupts(guest: Guest) -> dict[str, int]:
    """Return how often each interrupt of the card came, on all CPUs, by the guest's name for it."""
    found = {}
    for line in guest.console.check("grep virtio0 /proc/interrupts", ANSWER).splitlines():
        _, *words = line.split()
        found[words[-1]] = sum(map(int, takewhile(str.isdigit, words)))
    return found


@contextmanager
def watched(guest: Guest) -> Iterator[dict[str, int]]:
    """Yield what has, after the block, Python's counts in it."""
    before = guest.counters()
    seen: dict[str, int] = {}
    yield seen
    after = guest.counters()
    seen |= {name: after[name] - before[name] for name in after}


def looked_at(guest: Guest) -> dict[str, object]:
    """Return what the guest makes of its machine."""

    def said(command: str) -> str:
        return guest.console.check(command, ANSWER).strip()

    device = "/sys/class/net/eth0/device"
    return {
        "release": said("uname -r"),
        "cpus": int(said("nproc")),
        "modern": said(f"cat {device}/features")[_VERSION_1] == "1",
        "driver": said(f"basename $(readlink {device}/driver)"),
        "bus": said(f"basename $(readlink {device}/../driver)"),
        "pairs": int(said("ls /sys/class/net/eth0/queues | grep -c tx-")),
        "interrupts": said("grep virtio0 /proc/interrupts").splitlines(),
    }
