"""Run inside a lab VM: a QEMU whose guest never starts, and what `vhostctl workers` does to it.

QEMU owns its vhost devices when it makes them, so its workers are there before a guest is.
Prints what was said, and what /proc has, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vhostctl.host.worker import look_at_all

QUEUES = 2
WORKERS = QUEUES + 1
START = 120  # seconds, under an emulator
PARAMETER = Path("/sys/module/vhost/parameters/fork_from_owner_default")

QEMU = ["qemu-system-x86_64", "-S", "-M", "pc,accel=tcg", "-m", "64", "-display", "none"]
QEMU += ["-nodefaults"]
QEMU += ["-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no,vhost=on,queues=2"]
QEMU += ["-device", "virtio-net-pci,netdev=n,mq=on,romfile="]
QEMU += ["-device", "vhost-vsock-pci,guest-cid=3"]


def workers(*args: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "vhostctl", "workers", "--json", *args]
    said = subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout
    return dict(json.loads(said))


def wait_for_workers(qemu: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START
    while len(look_at_all()) < WORKERS:
        assert qemu.poll() is None
        assert time.monotonic() < deadline, look_at_all()
        time.sleep(0.1)


def lines(tid: int) -> list[str]:
    """Return what /proc has of where a task may run."""
    text = "".join(Path(f"/proc/{tid}/{file}").read_text() for file in ("status", "cgroup"))
    return [line for line in text.splitlines() if line.startswith(("Cpus_allowed_list:", "0::"))]


def kind() -> str:
    """Return what vhost makes of a worker; Linux 6.1 has no choice."""
    return "task" if PARAMETER.exists() and PARAMETER.read_text() == "Y\n" else "kthread"


def load(*options: str) -> None:
    """Load vhost with these options, whoever has loaded it before."""
    modules = ["vhost_net", "vhost_vsock"]
    subprocess.run(["modprobe", "-ra", *modules], check=True)
    subprocess.run(["modprobe", "vhost", *options], check=True)
    subprocess.run(["modprobe", "-a", *modules], check=True)


def visit(group: Path) -> dict[str, Any]:
    """Start a QEMU, look at its workers and put them elsewhere; return what was seen."""
    with subprocess.Popen(QEMU) as qemu:
        try:
            wait_for_workers(qemu)
            listed = workers()
            one = listed["workers"][0]["tid"]
            before = lines(one)
            return {
                "pid": qemu.pid,
                "kind": kind(),
                "listed": listed,
                "pinned": workers("--pid", str(qemu.pid), "--pin", "1"),
                "moved": workers(str(one), "--cgroup", group.name),
                "proc": {"before": before, "after": lines(one), "qemu": lines(qemu.pid)},
            }
        finally:
            qemu.kill()


def main() -> None:
    group = Path("/sys/fs/cgroup/vhost")
    group.mkdir()
    load()
    if PARAMETER.exists():
        # For kernel threads the group stays as it was made.
        load("fork_from_owner_default=0")
        reports = [visit(group)]
        load()
        (group / "cgroup.type").write_text("threaded")
        reports.append(visit(group))
    else:
        reports = [visit(group)]
    print(json.dumps({"reports": reports, "after": workers()}))


main()
