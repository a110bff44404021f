"""A real QEMU on descriptors that `vhostctl run` opened: its guest answers a ping."""

from __future__ import annotations

import lzma
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from virtme.cpiowriter import CpioWriter

from tests.vm.conftest import ROOT, fetched, run
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

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
INIT = """#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
for module in {modules}; do busybox insmod /$module.ko; done
busybox ip addr add 192.0.2.2/24 dev eth0
echo guest is up, $(busybox ls /sys/class/net/eth0/queues)
busybox ip link set eth0 up
busybox sleep 3600
"""


def unpacked(image: Path) -> bytes:
    """The ELF kernel in a bzImage (Documentation/arch/x86/boot.rst): unpacking it under two
    emulators takes a minute."""
    data = image.read_bytes()
    setup_sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    return lzma.LZMADecompressor().decompress(data[start : start + length])


def write_initramfs(kernel: Kernel, path: Path) -> None:
    busybox = shutil.which("busybox")
    assert busybox is not None
    names = [module.rpartition("/")[2] for module in MODULES]
    with path.open("wb") as file:
        archive = CpioWriter(file)
        for directory in (b"bin", b"dev", b"proc", b"sys"):
            archive.mkdir(directory, 0o755)
        archive.mkchardev(b"dev/console", (5, 1), mode=0o600)
        archive.write_file(b"bin/busybox", body=Path(busybox).read_bytes(), mode=0o755)
        archive.write_file(b"init", body=INIT.format(modules=" ".join(names)).encode(), mode=0o755)
        for module, name in zip(MODULES, names, strict=True):
            body = (kernel.modules / "kernel" / f"{module}.ko").read_bytes()
            archive.write_file(f"{name}.ko".encode(), body=body, mode=0o644)
        archive.write_trailer()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Kernel and initramfs of the guest: 6.1 whatever the host's kernel is."""
    kernel = fetched("6.1")
    directory = tmp_path_factory.mktemp("guest")
    vmlinux, initramfs = directory / "vmlinux", directory / "initramfs"
    vmlinux.write_bytes(unpacked(kernel.image))
    write_initramfs(kernel, initramfs)
    yield vmlinux, initramfs
    vmlinux.unlink()


@pytest.mark.vm
@pytest.mark.parametrize("queues", [1, 2])
def test_the_guest_answers(kernel: Kernel, guest: tuple[Path, Path], queues: int) -> None:
    script = str(ROOT / "tests/vm/ping_qemu.py")
    env_root = ["env", f"PYTHONPATH={ROOT}", "python", script]
    outcome = run(Machine(kernel), [*env_root, str(queues), *map(str, guest)], 600)
    print(outcome)
    assert outcome.status == 0
    assert "guest is up" in outcome.stdout
    if queues > 1:
        assert f"tx-{queues - 1}" in outcome.stdout
