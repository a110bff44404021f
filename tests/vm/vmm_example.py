"""Run inside a lab VM: examples/vmm.py boots a guest, which talks to the host and switches off."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.vm.tcp_qemu import ANSWER, BOOT, load_kvm
from tests.vm.vmm_machine import TAP, make_tap, started
from tests.vm.vmm_traffic import from_host

EXAMPLE = Path(__file__).parents[2] / "examples/vmm.py"


def main(kernel: str, initrd: str) -> None:
    load_kvm()
    make_tap(queues=1)
    with started([sys.executable, str(EXAMPLE), kernel, initrd, TAP]) as (process, console):
        console.log_in(BOOT)
        from_host()
        console.write("poweroff\n")
        console.wait_for(rb"ended: power off", ANSWER)
        status = process.wait(ANSWER)
        assert status == 0, f"{EXAMPLE}: exit status {status}"


if __name__ == "__main__":
    main(*sys.argv[1:])
