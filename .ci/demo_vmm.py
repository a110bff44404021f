"""`make demo-vmm`, inside the lab VM: a guest of `vhostctl vmm run` talks to this machine.

Arguments: kernel, initramfs. Shows what the guest says, and how often it left KVM for us.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import click

from tests.vm.tcp_qemu import load_kvm
from tests.vm.vmm_machine import HOST, booted, make_tap


def main(kernel: str, initrd: str) -> None:
    """Boot, ping, look at the interrupts, switch off."""
    load_kvm()
    make_tap(queues=1)
    asked = argparse.Namespace(
        kernel=Path(kernel),
        initrd=Path(initrd),
        cpus=1,
        memory=256,
        queues=1,
        device="/dev/vhost-net",
        without=[],
    )
    with booted(asked) as guest:
        for command in ("uname -sr", f"ping -c 3 {HOST}", "grep virtio0 /proc/interrupts"):
            click.echo(f"guest# {command}\n{guest.console.check(command, 120)}")
        before = guest.counters()
        guest.console.check(f"ping -q -c 100 -A {HOST} >/tmp/pings", 120)
        after = guest.counters()
        left = {name: after[name] - before[name] for name in ("doorbell-exits", "mmio-exits")}
        guest.console.write("poweroff\n")
        status = guest.end()
    click.echo(f"100 pings more; what of them left KVM: {left}; power-off: exit status {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
