"""Run inside a lab VM: a QEMU of user nobody's, with vhost through a broker, and refusals.

The firmware of its network card asks for an address, and so has vhost-net carry frames without
a guest. Prints what came of it as JSON.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vhostctl.host.worker import cpu_ns

VHOSTCTL = [sys.executable, "-m", "vhostctl"]
NOBODY = 65534
POLICY = """
[[allow]]
users = ["nobody"]
taps = ["vm-*"]
bridges = ["br0"]
per_user = 1
"""
REFUSED = {
    "tap": ["--tap", "eth7"],
    "bridge": ["--tap", "vm-1", "--bridge", "br1"],
    "queues": ["--tap", "vm-1", "--queues", "2"],
    "device": ["--tap", "vm-1", "--device", "/dev/vhost-net-mirror"],
    "count": ["--tap", "vm-1"],
    "user": ["--tap", "vm-1"],
}
LOG, ERRORS, FILE = Path("/run/broker-log"), Path("/run/qemu-errors"), Path("/run/broker.toml")
ANSWER = 240  # seconds: an emulated machine in an emulated machine


def everybodys() -> None:
    """Let other users through to the interpreter and the package, in this VM's root."""
    for path in (Path(sys.executable), Path(sys.executable).resolve(), Path(__file__)):
        for parent in path.parents:
            if not parent.stat().st_mode & 0o001:
                parent.chmod(0o755)


def as_user(uid: int) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + ANSWER
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {ANSWER} s: {what}")
        time.sleep(0.1)


@contextmanager
def broker() -> Iterator[subprocess.Popen[bytes]]:
    FILE.write_text(POLICY)
    with LOG.open("wb") as log:
        process = subprocess.Popen([*VHOSTCTL, "broker", "--policy", str(FILE)], stderr=log)
    try:
        until(lambda: "listening" in LOG.read_text() or process.poll() is not None, "the broker")
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def qemu() -> Iterator[subprocess.Popen[bytes]]:
    command = [*as_user(NOBODY), *VHOSTCTL, "run", "--broker", "--tap", "vm-0", "--bridge", "br0"]
    command += ["--", "qemu-system-x86_64", "-M", "q35", "-m", "64", "-display", "none"]
    command += ["-nodefaults", "-netdev", "tap,id=n,fds={tapfds},vhost=on,vhostfds={vhostfds}"]
    command += ["-device", "virtio-net-pci,netdev=n,bootindex=0"]
    with ERRORS.open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def frames() -> int:
    path = Path("/sys/class/net/vm-0/statistics/rx_packets")
    return int(path.read_text()) if path.exists() else 0


def workers(pid: int) -> list[int]:
    """Return the CPU time of each worker of process `pid`, in ns."""
    times = []
    for path in Path("/proc").glob("[0-9]*/task/*/comm"):
        with suppress(OSError):  # it ended between listing and reading
            if path.read_text().strip() == f"vhost-{pid}":
                times.append(cpu_ns(int(path.parent.name)))
    return times


def looked_at(pid: int) -> dict[str, object]:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    nodes = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return {
        "name": status["Name"],
        "uids": status["Uid"].split(),
        "groups": status["Groups"].split(),
        "capabilities": int(status["CapEff"], 16),
        "devices": nodes.count("/dev/vhost-net"),
        "bridge": Path("/sys/class/net/vm-0/master").resolve().name,
        "alias": Path("/sys/class/net/vm-0/ifalias").read_text().strip(),
    }


def refusal(kind: str) -> dict[str, object]:
    user = as_user(60001 if kind == "user" else NOBODY)
    command = [*user, *VHOSTCTL, "run", "--broker", *REFUSED[kind], "--", "true"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"status": run.returncode, "stderr": run.stderr.strip()}


def main() -> None:
    everybodys()
    Path("/dev/net/tun").chmod(0o600)  # nobody can open it, as the other node
    Path("/dev/vhost-net").chmod(0o600)
    for link in ("br0", "br1"):
        subprocess.run(["ip", "link", "add", link, "type", "bridge"], check=True)
    report: dict[str, object] = {}
    by_hand = [*as_user(NOBODY), "sh", "-c", ": <>/dev/vhost-net"]
    report["by hand"] = subprocess.run(by_hand, capture_output=True, check=False).returncode
    began = time.monotonic()
    with broker() as service:
        with qemu() as process:
            until(lambda: frames() or process.poll() is not None, "a frame of the guest's")
            report["seconds"] = round(time.monotonic() - began)
            report["frames"] = frames()
            report["qemu"] = looked_at(process.pid)
            report["workers"] = workers(process.pid)
            report["refused"] = {kind: refusal(kind) for kind in REFUSED}
        until(lambda: not Path("/sys/class/net/vm-0").exists(), "the tap is gone")
        service.send_signal(signal.SIGTERM)
        report["status"] = service.wait(ANSWER)
    report["errors"] = ERRORS.read_text()
    report["log"] = LOG.read_text().splitlines()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
