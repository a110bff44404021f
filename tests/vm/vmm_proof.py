"""Run inside a lab VM: a guest of `vhostctl vmm` talks to the host through a vhost device.

Boots it to a shell, has it do what a guest does, and prints what came of it as JSON. What
stops it is said on stderr, with all that the guest said, and ends it with 1. By hand, with 30
seconds of iperf3 in each direction and 64 MiB of file:

    vhostctl lab initrd -k 6.1 --add /usr/bin/iperf3 --add $PWD/tests/vm/vmm_guest.sh guest.cpio
    vhostctl lab run -k 6.1 -- python -m tests.vm.vmm_proof VMLINUZ guest.cpio \
        --seconds 30 --mib 64 --resume
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from tests.vm.tcp_qemu import (
    ANSWER,
    GUEST,
    TROUBLE,
    exchange,
    iperf,
    link_errors,
    load_kvm,
    loaded,
    mirror_rings,
)
from tests.vm.vmm_machine import HOST, TAP, Guest, booted, make_tap, resumed, until
from vhostctl.host.vhost import DEFAULT_PATH
from vhostctl.jobs import hosttraffic
from vhostctl.jobs.hosttraffic import HostSockets

GUEST_SCRIPT = Path(__file__).with_name("vmm_guest.sh")
ECHO = 7004  # the guest's port that says what it is told
SAVED = Path("/run/vmm-saved")
_ETH_P_ARP = 0x0806  # linux/if_ether.h
_BLOCK = bytes(range(256)) * 64


class Steps:
    """Says on stderr what begins; `seconds` is how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"proof: {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)


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
            while not self._over.is_set():
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

    def goes_on(self) -> int:
        """Wait for some rounds more, and return how many there were. Raises AssertionError."""
        least = self.rounds + 3
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
    guest.console.check(f"ping -c 3 -w {ANSWER} {HOST}", 2 * ANSWER)


def looked_at(guest: Guest) -> dict[str, object]:
    """Return what the guest makes of its machine."""

    def said(command: str) -> str:
        return guest.console.check(command, ANSWER).strip()

    device = "/sys/class/net/eth0/device"
    return {
        "release": said("uname -r"),
        "cpus": int(said("nproc")),
        "driver": said(f"basename $(readlink {device}/driver)"),
        "bus": said(f"basename $(readlink {device}/../driver)"),
        "pairs": int(said("ls /sys/class/net/eth0/queues | grep -c tx-")),
        "interrupts": said("grep virtio0 /proc/interrupts").splitlines(),
    }


def streams(arguments: argparse.Namespace, *options: str) -> list[dict[str, object]]:
    """Return what iperf3 says, once the guest's servers listen: one may be starting again."""
    while True:
        sums = iperf(arguments.queues, arguments.seconds, *options)
        if not any("refused" in str(one["error"]) for one in sums):
            return sums


def carry(guest: Guest, arguments: argparse.Namespace, steps: Steps) -> dict[str, object]:
    """A file and iperf3, each in both directions, and what Python did meanwhile."""
    before = guest.counters()
    with steps("file"):
        sums = exchange(arguments.mib << 20)
    with steps("iperf3 into the guest"):
        into = streams(arguments)
    with steps("iperf3 out of the guest"):
        out_of = streams(arguments, "-R")
    after = guest.counters()
    return {
        "sums": sums,
        "into": into,
        "out_of": out_of,
        "counters": {name: after[name] - before[name] for name in after},
    }


def masked(guest: Guest, arguments: argparse.Namespace, steps: Steps) -> dict[str, object]:
    """The same streams while the guest masks and unmasks its vectors all the time."""
    script = guest.console.check
    with steps("masked and unmasked"), Conversation() as conversation:
        script(f"sh {GUEST_SCRIPT} mask", ANSWER)
        into = streams(arguments)
        out_of = streams(arguments, "-R")
        rounds = int(script(f"sh {GUEST_SCRIPT} unmask", ANSWER))
        conversation.goes_on()
    return {"into": into, "out_of": out_of, "rounds": rounds}


def held(guest: Guest) -> None:
    """An interrupt that comes while its vector is masked comes when it is unmasked."""
    guest.console.check(f"sh {GUEST_SCRIPT} hold", ANSWER)
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(pings, 56)
        time.sleep(2)
        assert not answered.done(), "a ping was answered, and the interrupts are masked"
        guest.console.check(f"sh {GUEST_SCRIPT} release", ANSWER)
        assert answered.result() == 1, "an interrupt was lost while it was masked"


def link(guest: Guest) -> None:
    """Take the link down and up; the guest sees it each time."""
    for up in (False, True):
        guest.qmp.execute("set_link", name="net0", up=up)
        see = f"until [ $(cat /sys/class/net/eth0/carrier) = {up:d} ]; do sleep 1; done"
        guest.console.check(see, ANSWER)


def reload(guest: Guest) -> None:
    """Unload the guest's driver and load it again."""
    guest.console.check("rmmod virtio_net && ! [ -e /sys/class/net/eth0 ]", ANSWER)
    guest.console.check("modprobe virtio_net && network", ANSWER)


def leave(guest: Guest) -> dict[str, object]:
    """Return what the guest's kernel complained of, and switch the guest off."""
    # All of it would take the serial port a while.
    trouble = guest.console.run(f"dmesg | grep -E -B 2 -A 2 '{TROUBLE.pattern}'", ANSWER)[1]
    guest.console.write("poweroff\n")
    return {"trouble": trouble.splitlines(), "status": guest.end()}


def first_life(
    guest: Guest, arguments: argparse.Namespace, steps: Steps, report: dict[str, object]
) -> None:
    """All that a guest does between its boot and its end."""
    report["guest"] = looked_at(guest)
    with steps("ping"):
        from_host()
        from_guest(guest)
    with steps("servers"):
        guest.console.check(f"sh {GUEST_SCRIPT} serve", ANSWER)
    report |= carry(guest, arguments, steps)
    report["masked"] = masked(guest, arguments, steps)
    report["servers"] = guest.console.run("cat /tmp/iperf3", ANSWER)[1].splitlines()
    with steps("masked, and then not"):
        held(guest)
    with steps("link down and up"):
        link(guest)
        from_host()
    report["link_errors"] = link_errors()
    report["rings"] = mirror_rings()
    with steps("driver unloaded and loaded"):
        reload(guest)
        from_guest(guest)
        from_host()


def prove(arguments: argparse.Namespace, steps: Steps, report: dict[str, object]) -> None:
    """Have a guest do its things from its boot to its end, which may be in a second process."""
    with ExitStack() as stack:
        with steps("boot"):
            guest = stack.enter_context(booted(arguments))
        first_life(guest, arguments, steps, report)
        if not arguments.resume:
            with steps("power-off"):
                report["end"] = leave(guest)
            return
        conversation = stack.enter_context(Conversation())
        conversation.goes_on()
        with steps("save"):
            guest.qmp.execute("save", directory=str(SAVED))
            report["saved"] = {"status": guest.end(), "rounds": conversation.rounds}
        with steps("resume"), announcement():
            guest = stack.enter_context(resumed(arguments, SAVED))
        with steps("conversation"):
            report["resumed"] = {"rounds": conversation.goes_on()}
        from_guest(guest)
        with steps("power-off"):
            report["end"] = leave(guest)


def give_up(*_: object) -> None:
    raise AssertionError("the time limit was reached")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kernel", type=Path)
    parser.add_argument("initrd", type=Path)
    parser.add_argument("--device", default=DEFAULT_PATH)
    parser.add_argument("--module", type=Path, help="what to load for the device")
    parser.add_argument("--queues", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--memory", type=int, default=256, help="MiB")
    parser.add_argument("--seconds", type=int, default=3, help="of iperf3, in each direction")
    parser.add_argument("--mib", type=int, default=8, help="of the file")
    parser.add_argument("--resume", action="store_true", help="save the guest and go on with it")
    parser.add_argument("--without", action="append", default=[], metavar="ioeventfd|irqfd")
    parser.add_argument("--limit", type=int, default=900, help="seconds for all of it")
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(arguments.limit)
    load_kvm()
    steps = Steps()
    report: dict[str, object] = {"seconds": steps.seconds}
    try:
        with loaded(arguments.module):
            make_tap(arguments.queues)
            prove(arguments, steps, report)
    finally:
        dmesg = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
        print("dmesg:", dmesg, sep="\n", file=sys.stderr)
    report["trouble"] = [line for line in dmesg.splitlines() if TROUBLE.search(line)]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
