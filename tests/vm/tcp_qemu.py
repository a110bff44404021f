"""Run inside a lab VM: TCP through a QEMU guest on descriptors that `vhostctl run` opened.

Pings the guest, sends it a file and asks for it back, has iperf3 send for a while in each
direction, and prints what came of it as JSON. Whatever stops it is said on stderr, with the
guest's console, and ends it with 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from vhostctl.host.worker import cpu_ns
from vhostctl.jobs import hosttraffic
from vhostctl.jobs.hosttraffic import HostSockets

GUEST = "192.0.2.2"
# Ports in the guest; the last is the first of several, an iperf3 for each queue pair.
RECEIVER, SENDER, STATISTICS, IPERF = 7001, 7002, 7003, 5201
PAYLOAD = 8 << 20
CONSOLE, ERRORS = Path("/run/guest-console"), Path("/run/qemu-errors")

# Seconds; the guest runs under an emulator or two, on a machine that has other things to do.
BOOT = 300
ANSWER = 120

TROUBLE = re.compile(r"BUG|WARNING|Oops|Call Trace|general protection|UBSAN")
# What iperf3 says to a client, or of a server, that has the one before to end.
NOT_YET = re.compile("refused|busy|reset|closed unexpectedly")
FALLBACK = "falling back on userspace virtio"  # hw/net/virtio-net.c


def qemu_command(arguments: argparse.Namespace) -> list[str]:
    queues = arguments.queues
    # KVM too works under an emulator that has SVM, and far better than a second emulator.
    qemu = ["qemu-system-x86_64", "-M", "q35", "-accel", "kvm", "-accel", "tcg", "-cpu", "qemu64"]
    qemu += ["-m", "192", "-smp", str(queues), "-display", "none", "-nodefaults", "-no-reboot"]
    qemu += ["-serial", f"file:{CONSOLE}"]
    qemu += ["-kernel", str(arguments.kernel), "-initrd", str(arguments.initramfs)]
    qemu += ["-append", "console=ttyS0 panic=-1 quiet mitigations=off nokaslr tsc=reliable"]
    qemu += ["-netdev", "tap,id=n,fds={tapfds},vhost=on,vhostfds={vhostfds}"]
    vectors = f"mq=on,vectors={2 * queues + 2}" if queues > 1 else "mq=off"
    qemu += ["-device", f"virtio-net-pci,netdev=n,romfile=,{vectors}"]
    vhostctl = [sys.executable, "-m", "vhostctl", "run", "--tap", "tap0"]
    vhostctl += ["--device", arguments.device, "--queues", str(queues), "--addr", "192.0.2.1/24"]
    return [*vhostctl, "--", *qemu]


def load_kvm() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    for flag, module in (("svm", "kvm_amd"), ("vmx", "kvm_intel")):
        if flag in flags:
            subprocess.run(["modprobe", "-q", module], check=False)


def vhostctl(*argv: str) -> None:
    subprocess.run([sys.executable, "-m", "vhostctl", *argv], check=True, stdout=sys.stderr)


@contextmanager
def loaded(module: Path | None) -> Iterator[None]:
    """Load the mirror if it is what is tested, and unload it: nothing may have kept it."""
    if module is None:
        yield
        return
    vhostctl("kmod", "load", str(module))
    yield
    vhostctl("kmod", "unload")


@contextmanager
def running(arguments: argparse.Namespace) -> Iterator[subprocess.Popen[bytes]]:
    with ERRORS.open("wb") as errors:
        qemu = subprocess.Popen(qemu_command(arguments), stderr=errors)
    try:
        yield qemu
    except BaseException:
        for path in (CONSOLE, ERRORS):
            if path.exists():
                print(f"{path}:", path.read_text(errors="replace"), sep="\n", file=sys.stderr)
        raise
    finally:
        qemu.kill()
        qemu.wait()


def wait_for(qemu: subprocess.Popen[bytes]) -> None:
    """Return when the guest answered a ping: its servers are up then."""
    hosttraffic.PATIENCE = 2
    sockets = HostSockets(lambda function: function())
    deadline = time.monotonic() + BOOT
    while qemu.poll() is None and time.monotonic() < deadline:
        try:
            if sockets.ping(4, GUEST, [56]) == 1:
                return
        except OSError:
            time.sleep(1)  # no tap yet, or no route to the guest yet
    raise AssertionError(f"no answer from the guest; QEMU's status is {qemu.poll()}")


def received(sock: socket.socket) -> bytes:
    data = bytearray()
    while chunk := sock.recv(1 << 18):
        data += chunk
    return bytes(data)


def fetched(port: int) -> bytes:
    """Return all that a port of the guest's has to say."""
    with socket.create_connection((GUEST, port), timeout=ANSWER) as sock:
        return received(sock)


def exchange(size: int) -> dict[str, str]:
    """Send the guest a file, which says its SHA-256, and take the file back; return the sums."""
    data = os.urandom(size)
    with socket.create_connection((GUEST, RECEIVER), timeout=ANSWER) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        guest = received(sock).decode(errors="replace").split(" ")[0]
    back = hashlib.sha256(fetched(SENDER)).hexdigest()
    return {"sent": hashlib.sha256(data).hexdigest(), "guest": guest, "returned": back}


def each_second(outcome: dict[str, Any]) -> list[int]:
    """Return the bytes of each second where they arrived: a sender's buffer hides a stall.

    The guest has that list if it runs iperf3 with -J. What is left over at the end is no second.
    """
    for side in (outcome, outcome.get("server_output_json", {})):
        sums = [interval["sum"] for interval in side.get("intervals", [])]
        if sums and not sums[0]["sender"]:
            return [one["bytes"] for one in sums if one["seconds"] > 0.5]
    return []


def iperf(queues: int, seconds: int, *options: str) -> list[dict[str, object]]:
    """Run an iperf3 against each of the guest's at the same time; return what each carried."""

    def client(pair: int) -> dict[str, object]:
        argv = ["iperf3", "-J", "-c", GUEST, "-p", str(IPERF + pair), "-t", str(seconds)]
        argv += ["-P", str(queues), "--get-server-output", *options]
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, timeout=seconds + ANSWER
        )
        outcome = json.loads(done.stdout)
        sent, got = (outcome["end"].get(f"sum_{way}", {}) for way in ("sent", "received"))
        return {
            "status": done.returncode,
            "error": outcome.get("error"),
            "sent": sent.get("bytes", 0),
            "received": got.get("bytes", 0),
            "each_second": each_second(outcome),
            "seconds": got.get("seconds", 0),
            "retransmits": sent.get("retransmits"),
        }

    with ThreadPoolExecutor(queues) as pool:
        return list(pool.map(client, range(queues)))


def streams(queues: int, seconds: int, *options: str) -> list[dict[str, object]]:
    """Return what `iperf()` does, once each server takes it: one may be at the last one still."""
    deadline = time.monotonic() + ANSWER
    while True:
        sums = iperf(queues, seconds, *options)
        early = [one for one in sums if NOT_YET.search(str(one["error"])) and not one["received"]]
        if not early or time.monotonic() > deadline:
            return sums
        time.sleep(1)


def workers() -> dict[int, int]:
    """Return the CPU time of each vhost worker, in ns, by thread id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/task/*/comm"):
        with suppress(OSError):  # it ended between listing and reading
            if path.read_text().startswith("vhost-"):
                found[int(path.parent.name)] = cpu_ns(int(path.parent.name))
    return found


def link_errors() -> list[str]:
    """Return the errors that either end's link counted: TCP would send again and hide them."""
    lines = fetched(STATISTICS).decode().splitlines()
    for path in Path("/sys/class/net/tap0/statistics").iterdir():
        lines.append(f"{path}:{path.read_text().strip()}")
    return [line for line in lines if "errors:" in line and not line.endswith(":0")]


def mirror_rings() -> dict[str, dict[str, int]]:
    """Return what the mirror counted, by device and ring; the kernel's own counts nothing."""
    rings = {}
    for path in Path("/sys/kernel/debug/vhost_net_mirror").glob("*/[rt]x"):
        values = (line.split() for line in path.read_text().splitlines())
        rings[f"{path.parent.name}/{path.name}"] = {
            name: int(value, 0)
            for name, value in values
            if name in ("frames", "bytes", "drops", "misses") or name.startswith("bad_")
        }
    return rings


@contextmanager
def datagrams() -> Iterator[None]:
    """Send to the guest all the time, from many ports, so that each of its queues has some."""
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.005):
            for sock in sockets:
                with suppress(OSError):  # the guest says that nobody listens
                    sock.sendto(bytes(1000), (GUEST, 9))

    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(16)
        ]
        thread = threading.Thread(target=send)
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        yield


def busy(pid: int) -> list[int]:
    """Return how long each worker of a QEMU was busy in a second of traffic, as we tell it."""
    argv = [sys.executable, "-m", "vhostctl", "workers", "--json", "--pid", str(pid)]
    with datagrams():
        said = subprocess.run([*argv, "--interval", "1"], stdout=subprocess.PIPE, check=True).stdout
    return [worker["interval_cpu_ns"] for worker in json.loads(said)["workers"]]


def traffic(arguments: argparse.Namespace) -> dict[str, object]:
    """Boot the guest, talk to it, and return what came of it."""
    began = time.monotonic()
    with running(arguments) as qemu:
        wait_for(qemu)
        booted = time.monotonic()
        before = workers()
        sums = exchange(PAYLOAD)
        into = streams(arguments.queues, arguments.seconds)
        out_of = streams(arguments.queues, arguments.seconds, "-R")
        after = workers()
        looked = busy(qemu.pid)
        errors, rings = link_errors(), mirror_rings()
        descriptors = [entry.readlink() for entry in Path(f"/proc/{qemu.pid}/fd").iterdir()]
    return {
        "boot_s": round(booted - began),
        "total_s": round(time.monotonic() - began),
        "console": CONSOLE.read_text(errors="replace"),
        "stderr": ERRORS.read_text(errors="replace"),
        "devices": descriptors.count(Path(arguments.device)),
        "sums": sums,
        "into": into,
        "out_of": out_of,
        "link_errors": errors,
        "rings": rings,
        "busy_ns": looked,
        "workers_ms": sorted((after[tid] - before[tid]) // 10**6 for tid in before),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kernel", type=Path)
    parser.add_argument("initramfs", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--module", type=Path, help="what to load for the device")
    parser.add_argument("--queues", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=3, help="of iperf3, in each direction")
    arguments = parser.parse_args()
    load_kvm()
    try:
        with loaded(arguments.module):
            outcome = traffic(arguments)
    finally:
        dmesg = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
        print("dmesg:", dmesg, sep="\n", file=sys.stderr)
    outcome["trouble"] = [line for line in dmesg.splitlines() if TROUBLE.search(line)]
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
