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
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.vm.tcp_qemu import (
    ANSWER,
    TROUBLE,
    exchange,
    link_errors,
    load_kvm,
    loaded,
    mirror_rings,
    streams,
)
from tests.vm.vmm_machine import Guest, booted, make_tap, resumed
from tests.vm.vmm_traffic import (
    GUEST_SCRIPT,
    Conversation,
    announcement,
    from_guest,
    from_host,
    interrupts,
    looked_at,
    pings,
    watched,
)
from vhostctl.host.vhost import DEFAULT_PATH

SAVED = Path("/run/vmm-saved")


class Steps:
    """Says on stderr what begins; `seconds` is how long each took in all."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"proof: {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self.seconds[name] = round(self.seconds.get(name, 0) + took, 1)


def files(guest: Guest, mib: int, steps: Steps) -> dict[str, object]:
    """A file in both directions, and what Python did meanwhile."""
    with steps("file"), watched(guest) as counters:
        sums = exchange(mib << 20)
    return {"sums": sums, "counters": counters}


def both_ways(arguments: argparse.Namespace, steps: Steps) -> dict[str, object]:
    pairs = min(arguments.queues, arguments.cpus)  # what Linux uses of them
    with steps("iperf3 into the guest"):
        into = streams(pairs, arguments.seconds)
    with steps("iperf3 out of the guest"):
        out_of = streams(pairs, arguments.seconds, "-R")
    return {"into": into, "out_of": out_of}


def carry(guest: Guest, arguments: argparse.Namespace, steps: Steps) -> dict[str, object]:
    """iperf3 in both directions, and who had interrupts meanwhile: each vector, and Python."""
    before = interrupts(guest)
    with watched(guest) as counters:
        sums = both_ways(arguments, steps)
    after = interrupts(guest)
    came = {name: after[name] - before[name] for name in after}
    return {**sums, "interrupts": came, "counters": counters}


@contextmanager
def masking(guest: Guest) -> Iterator[dict[str, object]]:
    """Have the guest mask and unmask its vectors all the time; yield what has, then, how often.

    A conversation goes on meanwhile, which an interrupt that is lost would end.
    """
    report: dict[str, object] = {}
    with Conversation() as conversation:
        guest.console.check(f"sh {GUEST_SCRIPT} mask", ANSWER)
        yield report
        conversation.goes_on(10)
        report["rounds"] = int(guest.console.check(f"sh {GUEST_SCRIPT} unmask", ANSWER))
        conversation.goes_on()


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
        see = f"until [ $(cat /sys/class/net/eth0/carrier) = {up:d} ]; do usleep 100000; done"
        guest.console.check(see, ANSWER)


def reload(guest: Guest, steps: Steps) -> None:
    """Unload the guest's driver and load it again."""
    with steps("driver unloaded and loaded"):
        guest.console.check("rmmod virtio_net && ! [ -e /sys/class/net/eth0 ]", ANSWER)
        guest.console.check("modprobe virtio_net && network", ANSWER)
        from_guest(guest)
        from_host()


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
    report |= {"guest": looked_at(guest), "nodes": guest.vhost_nodes()}
    with steps("ping"):
        from_host()
        from_guest(guest)
    with steps("servers"):
        guest.console.check(f"sh {GUEST_SCRIPT} serve", ANSWER)
    report["file"] = files(guest, arguments.mib, steps)
    if not arguments.short:
        report["iperf3"] = carry(guest, arguments, steps)
        with steps("masked and unmasked"), masking(guest) as masked:
            masked |= both_ways(arguments, steps)
        report["masked"] = masked
        with steps("masked, and then not"):
            held(guest)
        with steps("link down and up"):
            link(guest)
            from_host()
    report["link_errors"] = link_errors()
    report["rings"] = mirror_rings()
    reload(guest, steps)


def later_life(guest: Guest, options: list[str], steps: Steps) -> dict[str, object]:
    """What a guest does that was saved and goes on with other `options`."""
    from_guest(guest)
    report: dict[str, object] = {
        "nodes": guest.vhost_nodes(),
        "file": files(guest, 1, steps),
        "rings": mirror_rings(),
    }
    if "--no-irqfd" in options:
        # What a mask does is another thing then.
        with steps("masked and unmasked"), masking(guest) as report["masked"]:
            pass
        with steps("masked, and then not"):
            held(guest)
    return report


def prove(arguments: argparse.Namespace, steps: Steps, report: dict[str, object]) -> None:
    """Have a guest do its things from its boot to its end, in one process after the other."""
    with ExitStack() as stack:
        with steps("boot"):
            guest = stack.enter_context(booted(arguments, arguments.append))
        first_life(guest, arguments, steps, report)
        lives: list[dict[str, object]] = []
        with ExitStack() as talk:
            if arguments.resume:
                conversation = talk.enter_context(Conversation())
                conversation.goes_on()
            for options in map(shlex.split, arguments.resume):
                with steps("save"):
                    guest.qmp.execute("save", directory=str(SAVED))
                    saved = {"status": guest.end(), "rounds": conversation.rounds}
                with steps("resume"), announcement():
                    guest = stack.enter_context(resumed(arguments, SAVED, options))
                with steps("conversation"):
                    rounds = conversation.goes_on()
                life = later_life(guest, options, steps)
                lives.append({"saved": saved, "rounds": rounds, **life})
        report["lives"] = lives
        if lives:
            reload(guest, steps)
        report["servers"] = guest.console.run("cat /tmp/iperf3", ANSWER)[1].splitlines()
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
    parser.add_argument("--short", action="store_true", help="no iperf3, no masks, no link")
    parser.add_argument("--append", default="", help="to the guest's kernel's command line")
    parser.add_argument("--without", action="append", default=[], metavar="ioeventfd|irqfd")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="save the guest and go on with it, with other options of `vhostctl vmm resume`",
    )
    parser.add_argument("--limit", type=int, default=900, help="seconds for all of it")
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(arguments.limit)
    load_kvm()
    steps = Steps()
    report: dict[str, object] = {"seconds": steps.seconds}
    # Or what a slow stream had learned makes those after it slow.
    Path("/proc/sys/net/ipv4/tcp_no_metrics_save").write_text("1")
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
