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
    """Return what vhost makes of a worker; Linux 6.1 has no choice (vhost.c)."""
    parameter = Path("/sys/module/vhost/parameters/fork_from_owner_default")
    return "task" if parameter.exists() and parameter.read_text() == "Y\n" else "kthread"


def main() -> None:
    subprocess.run(["modprobe", "-a", "vhost_net", "vhost_vsock", "tun"], check=True)
    group = Path("/sys/fs/cgroup/vhost")
    group.mkdir()
    if kind() == "task":
        (group / "cgroup.type").write_text("threaded")
    with subprocess.Popen(QEMU) as qemu:
        try:
            wait_for_workers(qemu)
            pid = str(qemu.pid)
            report: dict[str, Any] = {"pid": qemu.pid, "kind": kind(), "listed": workers()}
            one = report["listed"]["workers"][0]["tid"]
            before = lines(one)
            report["pinned"] = workers("--pid", pid, "--pin", "1")
            report["moved"] = workers(str(one), "--cgroup", "vhost")
            report["proc"] = {"before": before, "after": lines(one), "qemu": lines(qemu.pid)}
        finally:
            qemu.kill()
    report["after"] = workers()
    print(json.dumps(report))


main()
