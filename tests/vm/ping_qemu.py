"""Run inside a lab VM: a QEMU guest on descriptors that `vhostctl run` opened must answer.

Arguments: queue pairs, the guest's kernel, its initramfs. Ends 0 if the guest answered a
ping through vhost workers that did something.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from vhostctl.host.worker import cpu_ns
from vhostctl.jobs import hosttraffic
from vhostctl.jobs.hosttraffic import HostSockets

SECONDS = 400
GUEST = "192.0.2.2"


def command(queues: int, kernel: str, initrd: str, console: Path) -> list[str]:
    qemu = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "qemu64", "-m", "192"]
    qemu += ["-smp", str(queues), "-display", "none", "-nodefaults", "-no-reboot"]
    qemu += ["-serial", f"file:{console}", "-kernel", kernel, "-initrd", initrd]
    qemu += ["-append", "console=ttyS0 panic=-1 quiet mitigations=off nokaslr tsc=reliable"]
    qemu += ["-netdev", "tap,id=n,fds={tapfds},vhost=on,vhostfds={vhostfds}"]
    vectors = f"mq=on,vectors={2 * queues + 2}" if queues > 1 else "mq=off"
    qemu += ["-device", f"virtio-net-pci,netdev=n,romfile=,{vectors}"]
    vhostctl = [sys.executable, "-m", "vhostctl", "run", "--tap", "tap0"]
    return [*vhostctl, "--queues", str(queues), "--addr", "192.0.2.1/24", "--", *qemu]


def busy_workers() -> int:
    tids = {
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/task/*/comm")
        if path.read_text().startswith("vhost-")
    }
    return sum(cpu_ns(tid) > 0 for tid in tids)


def main() -> int:
    queues, (kernel, initrd) = int(sys.argv[1]), sys.argv[2:]
    console = Path("/run/guest-console")
    hosttraffic.PATIENCE = 2
    sockets = HostSockets(lambda function: function())
    with subprocess.Popen(command(queues, kernel, initrd, console), stderr=subprocess.PIPE) as qemu:
        deadline = time.monotonic() + SECONDS
        answered = False
        while not answered and qemu.poll() is None and time.monotonic() < deadline:
            try:
                answered = sockets.ping(4, GUEST, [56]) == 1
            except OSError:
                time.sleep(1)  # no tap yet, or no route to the guest yet
        workers = busy_workers()
        qemu.kill()
        _, error = qemu.communicate()
    text = console.read_text(errors="replace") if console.exists() else ""
    print(f"answered {answered}, busy workers {workers}", text, error.decode(), sep="\n")
    return 0 if answered and workers >= 1 and b"falling back" not in error else 1


if __name__ == "__main__":
    sys.exit(main())
