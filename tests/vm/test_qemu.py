"""A real QEMU on descriptors that `vhostctl run` opened: TCP goes through its guest unharmed.

VHOSTCTL_TCP_SECONDS is how long iperf3 sends in each direction.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from virtme.cpiowriter import CpioWriter

from tests.vm.conftest import Outcome, fetched, run
from tests.vm.tcp_qemu import ANSWER, BOOT, FALLBACK, IPERF, RECEIVER, SENDER, STATISTICS
from vhostctl.host.vhost import DEFAULT_PATH
from vhostctl.kmod import NODE
from vhostctl.lab.guest import LostMachineError
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

SECONDS = int(os.environ.get("VHOSTCTL_TCP_SECONDS", "3"))

# In the order of their dependencies.
MODULES = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
)

# The link comes up when everybody listens (state 0A in proc(5)'s /proc/net/tcp). An iperf3 for
# each queue pair, on a CPU of its own, which is what the driver chooses the queue by.
INIT = f"""#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
for module in {{modules}}; do busybox insmod /$module.ko; done
busybox ip addr add 192.0.2.2/24 dev eth0
busybox nc -ll -p {RECEIVER} -e /receive &
busybox nc -ll -p {SENDER} -e /bin/busybox cat /tmp/file &
busybox nc -ll -p {STATISTICS} -e /bin/busybox grep -r . /sys/class/net/eth0/statistics &
pairs=0
while [ -d /sys/class/net/eth0/queues/tx-$pairs ]; do
    busybox taskset $((1 << pairs)) iperf3 -s -p $(({IPERF} + pairs)) >/dev/null &
    pairs=$((pairs + 1))
done
until [ "$(busybox cat /proc/net/tcp /proc/net/tcp6 | busybox grep -c ' 0A ')" = $((pairs + 3)) ]
do busybox sleep 1; done
echo guest is up, queue pairs: $pairs
busybox ip link set eth0 up
busybox sleep 36000
"""
RECEIVE = "#!/bin/busybox sh\nbusybox tee /tmp/file | busybox sha256sum\n"


@dataclass(frozen=True)
class Guest:
    kernel: Path
    initramfs: Path


def unpacked(image: Path) -> bytes:
    """The ELF kernel in a bzImage (Documentation/arch/x86/boot.rst): unpacking it under an
    emulator takes long."""
    data = image.read_bytes()
    setup_sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    return lzma.LZMADecompressor().decompress(data[start : start + length])


def program(name: str) -> Path:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name}: apt install {name}")
    return Path(path)


def libraries(binary: Path) -> list[Path]:
    """What a program is linked to, the loader among it (ldd(1))."""
    said = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=True).stdout
    return [Path(word) for word in said.split() if word.startswith("/")]


def guest_files(kernel: Kernel) -> dict[str, bytes]:
    """What is in the initramfs, by path."""
    busybox, iperf3 = program("busybox"), program("iperf3")
    names = [module.rpartition("/")[2] for module in MODULES]
    files = {str(path).lstrip("/"): path.read_bytes() for path in libraries(iperf3)}
    for module, name in zip(MODULES, names, strict=True):
        files[f"{name}.ko"] = (kernel.modules / "kernel" / f"{module}.ko").read_bytes()
    return files | {
        "bin/busybox": busybox.read_bytes(),
        "bin/iperf3": iperf3.read_bytes(),
        "init": INIT.format(modules=" ".join(names)).encode(),
        "receive": RECEIVE.encode(),
    }


def write_initramfs(kernel: Kernel, path: Path) -> None:
    files = guest_files(kernel)
    parents = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    with path.open("wb") as file:
        archive = CpioWriter(file)
        for directory in sorted(parents | {"dev", "proc", "sys", "tmp"}):
            archive.mkdir(directory.encode(), 0o755)
        archive.mkchardev(b"dev/console", (5, 1), mode=0o600)
        for name, body in files.items():
            archive.write_file(name.encode(), body=body, mode=0o755)
        archive.write_trailer()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """Kernel and initramfs of the guest: 6.1 whatever the host's kernel is."""
    kernel = fetched("6.1")
    directory = tmp_path_factory.mktemp("guest")
    made = Guest(directory / "vmlinux", directory / "initramfs")
    write_initramfs(kernel, made.initramfs)
    made.kernel.write_bytes(unpacked(kernel.image))
    yield made
    made.kernel.unlink()


# Two pairs take two CPUs, which under KVM under the emulator now and then fall silent.
QUEUES = [1, pytest.param(2, marks=pytest.mark.soak)]
GONE = re.compile("timed out|QEMU's status is|No route to host|Network is unreachable")


def in_a_vm(kernel: Kernel, cpus: int, argv: list[str]) -> Outcome | None:
    """Run `argv` in a VM; None if that was lost, or its guest was or fell silent.

    A guest under KVM under the emulator does so now and then, on the kernel's vhost-net as on
    ours, with two CPUs more often, and mostly while it sends for long and the machine is busy.
    """
    try:
        outcome = run(Machine(kernel, cpus), argv, BOOT + 5 * ANSWER + 2 * SECONDS)
    except LostMachineError as lost:
        print(lost)
        return None
    print(outcome)
    return None if outcome.status and GONE.search(outcome.stderr) else outcome


def through_guest(
    kernel: Kernel, guest: Guest, device: str, queues: int, *more: str
) -> dict[str, Any]:
    """Run the traffic in a VM, look at what came of it and return that."""
    argv = ["python", "-m", "tests.vm.tcp_qemu", str(guest.kernel), str(guest.initramfs)]
    argv += ["--device", device, "--queues", str(queues), "--seconds", str(SECONDS), *more]
    outcome = in_a_vm(kernel, queues, argv) or in_a_vm(kernel, queues, argv)
    assert outcome is not None
    assert outcome.status == 0, outcome
    report = json.loads(outcome.stdout)
    assert f"guest is up, queue pairs: {queues}" in report["console"]
    assert report["devices"] == queues
    assert FALLBACK not in report["stderr"]
    assert len(set(report["sums"].values())) == 1
    for sums in (*report["into"], *report["out_of"]):
        assert (sums["status"], sums["error"]) == (0, None)
        assert min(sums["sent"], sums["received"]) > 0
    assert report["link_errors"] == []
    assert len(report["workers_ms"]) == len(report["busy_ns"]) == queues
    assert min(report["busy_ns"]) > 0
    assert 20 * min(report["workers_ms"]) > max(report["workers_ms"])  # each did its part
    assert report["trouble"] == []
    return cast(dict[str, Any], report)


@pytest.mark.vm
@pytest.mark.parametrize("queues", QUEUES)
def test_tcp_goes_through_the_kernels_own(kernel: Kernel, guest: Guest, queues: int) -> None:
    through_guest(kernel, guest, DEFAULT_PATH, queues)


@pytest.mark.vm
@pytest.mark.parametrize("queues", QUEUES)
def test_tcp_goes_through_the_mirror(
    kernel: Kernel, guest: Guest, module: Path, queues: int
) -> None:
    report = through_guest(kernel, guest, NODE, queues, "--module", str(module))
    assert len(report["rings"]) == 2 * queues
    for counted in report["rings"].values():
        assert min(counted.pop("frames"), counted.pop("bytes")) > 0
        assert set(counted.values()) == {0}
