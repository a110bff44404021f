"""`vhostctl vmm` in a VM: a stock kernel boots as its guest and talks through a vhost device.

VHOSTCTL_VMM_SECONDS is how long iperf3 sends in each direction, VHOSTCTL_VMM_MIB how much
goes there and back as a file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.vm.conftest import Outcome, run
from tests.vm.vmm_proof import GUEST_SCRIPT
from vhostctl.host.vhost import ENGINE
from vhostctl.kmod import NODE
from vhostctl.lab import initrd
from vhostctl.lab.guest import LostMachineError
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

SECONDS = int(os.environ.get("VHOSTCTL_VMM_SECONDS", "3"))
MIB = int(os.environ.get("VHOSTCTL_VMM_MIB", "8"))
TRIES = 3
LOST = re.compile(r"the guest is lost|Kernel panic - not syncing|^.*\] Oops: ", re.MULTILINE)
LIMIT = 600 + 8 * SECONDS  # seconds for the guest; the machine around it has more


@pytest.fixture
def guest_initrd(kernel: Kernel, tmp_path: Path) -> Path:
    """The initramfs of a guest with the kernel under test."""
    iperf3 = shutil.which("iperf3")
    if iperf3 is None:
        pytest.skip("no iperf3: apt install iperf3")
    path = tmp_path / "guest.cpio"
    initrd.write(kernel, path, [Path(iperf3), GUEST_SCRIPT])
    return path


def in_a_vm(kernel: Kernel, argv: Sequence[str]) -> Outcome | None:
    """Run `argv` in a VM; None if that was lost, or its guest.

    Under QEMU's emulator of SVM both happen in about one run of ten, on every vhost device:
    an oops shows flags with bits that no processor has.
    """
    try:
        # One CPU: code that a guest patches on one may run stale on another under the emulator.
        outcome = run(Machine(kernel, 1), argv, LIMIT + 120)
    except LostMachineError as lost:
        print(lost)
        return None
    if outcome.status and LOST.search(outcome.stderr):
        print(outcome)
        return None
    return outcome


def proof(kernel: Kernel, guest_initrd: Path, *options: str) -> dict[str, Any]:
    """Run tests/vm/vmm_proof.py, look at what holds for every guest, and return what it saw."""
    argv = ["python", "-m", "tests.vm.vmm_proof", str(kernel.image), str(guest_initrd)]
    argv += ["--seconds", str(SECONDS), "--mib", str(MIB), "--limit", str(LIMIT), *options]
    outcome = next(filter(None, (in_a_vm(kernel, argv) for _ in range(TRIES))), None)
    assert outcome is not None, f"the guest was lost {TRIES} times"
    print(outcome)
    assert outcome.status == 0
    report: dict[str, Any] = json.loads(outcome.stdout)
    guest = report["guest"]
    assert guest["release"] == kernel.release
    assert (guest["driver"], guest["bus"]) == ("virtio_net", "virtio-pci")
    assert all("MSI" in line for line in guest["interrupts"])
    assert len(guest["interrupts"]) == 1 + 2 * guest["pairs"]
    assert len(set(report["sums"].values())) == 1
    streams = [report, report["masked"]]
    for sums in [one for way in streams for one in (*way["into"], *way["out_of"])]:
        assert (sums["status"], sums["error"]) == (0, None)
        assert min(sums["sent"], sums["received"]) > 0
    assert report["masked"]["rounds"] > 3
    assert report["link_errors"] == []
    assert report["end"] == {"status": 0, "trouble": []}
    assert report["trouble"] == []
    return report


def check_out_of_python(report: dict[str, Any]) -> None:
    """Neither a doorbell nor an interrupt went through Python while data did."""
    counters = report["counters"]
    assert (counters["doorbell-exits"], counters["interrupts-raised"]) == (0, 0)


@pytest.mark.vm
@pytest.mark.parametrize("pairs", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_guest_of_the_kernels_own_vhost(kernel: Kernel, guest_initrd: Path, pairs: int) -> None:
    many = ["--queues", str(pairs), "--cpus", str(pairs)]
    report = proof(kernel, guest_initrd, *many, "--resume")
    assert (report["guest"]["cpus"], report["guest"]["pairs"]) == (pairs, pairs)
    check_out_of_python(report)
    assert report["saved"]["status"] == 0
    assert report["resumed"]["rounds"] > report["saved"]["rounds"]


@pytest.mark.vm
def test_a_guest_without_ioeventfd_and_irqfd(kernel: Kernel, guest_initrd: Path) -> None:
    report = proof(kernel, guest_initrd, "--without", "ioeventfd", "--without", "irqfd")
    assert report["counters"]["doorbell-exits"] > 0
    assert report["counters"]["interrupts-raised"] > 0


@pytest.mark.vm
@pytest.mark.soak
@pytest.mark.parametrize("switch", ["ioeventfd", "irqfd"])
def test_a_guest_without_one_of_them(kernel: Kernel, guest_initrd: Path, switch: str) -> None:
    counters = proof(kernel, guest_initrd, "--without", switch)["counters"]
    assert (counters["doorbell-exits"] > 0) == (switch == "ioeventfd")
    assert (counters["interrupts-raised"] > 0) == (switch == "irqfd")


@pytest.mark.vm
@pytest.mark.soak
def test_a_guest_of_the_mirror(kernel: Kernel, guest_initrd: Path, module: Path) -> None:
    report = proof(kernel, guest_initrd, "--device", NODE, "--module", str(module))
    check_out_of_python(report)
    for counted in report["rings"].values():
        assert min(counted.pop("frames"), counted.pop("bytes")) > 0
        assert set(counted.values()) == {0}
    assert len(report["rings"]) == 2


@pytest.mark.vm
@pytest.mark.soak
def test_a_guest_of_the_engine(kernel: Kernel, guest_initrd: Path) -> None:
    check_out_of_python(proof(kernel, guest_initrd, "--device", ENGINE))
