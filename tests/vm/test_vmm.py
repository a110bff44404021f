"""`vhostctl vmm` in a VM: a stock kernel boots as its guest and talks through a vhost device.

VHOSTCTL_VMM_SECONDS is how long iperf3 sends in each direction, VHOSTCTL_VMM_MIB how much
goes there and back as a file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.vm.conftest import Outcome, run
from tests.vm.vmm_traffic import GUEST_SCRIPT
from vhostctl.host.vhost import DEFAULT_PATH, ENGINE
from vhostctl.kmod import NODE
from vhostctl.lab import initrd
from vhostctl.lab.guest import LostMachineError
from vhostctl.lab.kernels import Kernel
from vhostctl.lab.vm import Machine

SECONDS = int(os.environ.get("VHOSTCTL_VMM_SECONDS", "2"))
MIB = int(os.environ.get("VHOSTCTL_VMM_MIB", "8"))
TRIES = 3
WITHOUT_BOTH = "--no-ioeventfd --no-irqfd"
LOST = re.compile(
    r"^.*(?:the guest is lost|Kernel panic - not syncing|: [0-9a-f]{4} \[#[0-9]+\]).*$",
    re.MULTILINE,
)
FLAGS = re.compile(r"EFLAGS: [0-9a-f]+")
LIMIT = 600 + 12 * SECONDS  # seconds for the guest; the machine around it has more

# A guest that was lost must be seen even if the next one was not.
pytestmark = pytest.mark.filterwarnings("always:lost")


@pytest.fixture
def guest_initrd(kernel: Kernel, tmp_path: Path) -> Path:
    """The initramfs of a guest with the kernel under test."""
    iperf3 = shutil.which("iperf3")
    if iperf3 is None:
        pytest.skip("no iperf3: apt install iperf3")
    path = tmp_path / "guest.cpio"
    initrd.write(kernel, path, [Path(iperf3), GUEST_SCRIPT])
    return path


def why_lost(outcome: Outcome) -> str | None:
    """Return what a guest, or the machine around it, said of its end; None if it was not lost."""
    match = LOST.search(outcome.stderr)
    if outcome.status == 0 or match is None:
        return None
    flags = FLAGS.search(outcome.stderr)
    return f"{match[0].strip()} {flags[0] if flags else ''}".strip()


def in_a_vm(kernel: Kernel, argv: Sequence[str]) -> Outcome:
    """Run `argv` in a VM, at most `TRIES` times if that was lost, or its guest.

    Under QEMU's emulator of SVM both happen in about one run of ten, on every vhost device:
    an oops shows flags with bits that no processor has. Each is a warning in the summary; three
    in a row are a failure, by the emulator in one of a thousand and by us if it is us.
    """
    for _ in range(TRIES):
        try:
            # One CPU: code that a guest patches on one may run stale on another under the
            # emulator.
            outcome = run(Machine(kernel, 1), argv, LIMIT + 120)
        except LostMachineError as lost:
            print(lost)
            why: str | None = f"the machine: {lost}".partition("\n")[0]
        else:
            print(outcome)
            why = why_lost(outcome)
            if why is None:
                return outcome
        warnings.warn(f"lost on Linux {kernel.release}: {why}", stacklevel=1)
    pytest.fail(f"lost {TRIES} times, the last time: {why}")


OOPS = "[ 60.3] Oops: Oops: 0002 [#1]\n[ 62.6] RSP: 0018:ffa000000008fd78 EFLAGS: 05784483\n"
FAULT = "[   60.3] general protection fault, maybe for address 0x0: 0000 [#1] PREEMPT SMP NOPTI\n"
SHUT = "Error: vCPU 0: shutdown: the guest is lost\n"


@pytest.mark.parametrize("said", [OOPS, FAULT, SHUT])
def test_a_guest_that_is_lost_has_more_tries(
    kernel: Kernel, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = [*[Outcome(1, "", said)] * TRIES, Outcome(0, "", said)]
    monkeypatch.setattr(f"{__name__}.run", lambda *_: outcomes.pop(0))
    with pytest.warns(match="lost on Linux"), pytest.raises(pytest.fail.Exception):
        in_a_vm(kernel, [])
    assert in_a_vm(kernel, []).status == 0


def test_a_guest_that_fails_has_no_other_try(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.run", lambda *_: Outcome(1, "", "AssertionError: no ping"))
    assert in_a_vm(kernel, []).status == 1


def proof(kernel: Kernel, guest_initrd: Path, *options: str) -> dict[str, Any]:
    """Run tests/vm/vmm_proof.py, look at what holds for every guest, and return what it saw."""
    argv = ["python", "-m", "tests.vm.vmm_proof", str(kernel.image), str(guest_initrd)]
    argv += ["--seconds", str(SECONDS), "--mib", str(MIB), "--limit", str(LIMIT), *options]
    outcome = in_a_vm(kernel, argv)
    assert outcome.status == 0
    report: dict[str, Any] = json.loads(outcome.stdout)
    guest = report["guest"]
    assert guest["release"] == kernel.release
    assert (guest["driver"], guest["bus"]) == ("virtio_net", "virtio-pci")
    for life in (report, *report["lives"]):
        assert len(set(life["file"]["sums"].values())) == 1
        for moved in (life[name] for name in ("iperf3", "masked") if name in life):
            check_streams(moved)
        assert "masked" not in life or life["masked"]["rounds"] > 3
    check_going_on(report["lives"])
    assert report["link_errors"] == []
    assert report["end"] == {"status": 0, "trouble": []}
    assert report["trouble"] == []
    return report


def check_streams(streams: dict[str, Any]) -> None:
    """No stream, if there was any, stood still for two seconds.

    A lost interrupt that nothing follows on stops a stream for good. One that TCP's next try
    heals, which takes 200 ms and more, goes unseen: this machine may be as slow as that.
    """
    for one in (*streams.get("into", ()), *streams.get("out_of", ())):
        assert (one["status"], one["error"]) == (0, None)
        assert min(one["sent"], one["received"]) > 0
        assert len(one["each_second"]) >= SECONDS / 2
        assert all(map(any, pairwise(one["each_second"]))), one


def check_going_on(lives: Sequence[dict[str, Any]]) -> None:
    """The guest's TCP connection went on in every process after the first."""
    for life in lives:
        assert life["saved"]["status"] == 0
        assert life["rounds"] > life["saved"]["rounds"]


def check_messages(report: dict[str, Any], pairs: int, used: int) -> None:
    """The card of `pairs` has a vector for each queue, and those of the `used` pairs raised it."""
    assert report["guest"]["modern"]
    assert all("MSI" in line for line in report["guest"]["interrupts"])
    came = report["iperf3"]["interrupts"]
    vectors = {
        f"virtio0-{way}.{pair}": pair for pair in range(pairs) for way in ("input", "output")
    }
    assert came.keys() == {"virtio0-config", *vectors}
    for name, pair in vectors.items():
        assert (came[name] > 0) == (pair < used), came


def check_python(moved: dict[str, Any], *, doorbells: bool = False, raised: bool = False) -> None:
    """Doorbells and interrupts went through Python, or did not, while data moved."""
    counters = moved["counters"]
    assert (counters["doorbell-exits"] > 0) == doorbells, counters
    assert (counters["interrupts-raised"] > 0) == raised, counters


def check_out_of_python(report: dict[str, Any]) -> None:
    """Neither a doorbell nor an interrupt went through Python while data did."""
    check_python(report["iperf3"])
    check_python(report["file"])


def check_rings(rings: dict[str, dict[str, int]]) -> None:
    """Both rings of the mirror carried frames, and it found nothing wrong."""
    assert len(rings) == 2
    for counted in rings.values():
        assert min(counted.pop("frames"), counted.pop("bytes")) > 0
        assert set(counted.values()) == {0}


@pytest.mark.vm
@pytest.mark.parametrize(
    ("cpus", "pairs"),
    [(1, 1), *(pytest.param(*many, marks=pytest.mark.soak) for many in ((2, 1), (1, 2), (2, 2)))],
)
def test_a_guest_of_the_kernels_own_vhost(
    kernel: Kernel, guest_initrd: Path, cpus: int, pairs: int
) -> None:
    """It goes on in a second process, and in a third without ioeventfd and irqfd."""
    many = ["--queues", str(pairs), "--cpus", str(cpus)]
    report = proof(kernel, guest_initrd, *many, "--resume", f"--resume={WITHOUT_BOTH}")
    used = min(cpus, pairs)
    assert (report["guest"]["cpus"], report["guest"]["pairs"]) == (cpus, used)
    assert report["nodes"] == [DEFAULT_PATH] * pairs
    check_messages(report, pairs, used)
    check_out_of_python(report)
    check_python(report["lives"][0]["file"])
    check_python(report["lives"][1]["file"], doorbells=True, raised=True)
    assert "masked" in report["lives"][1]


@pytest.mark.vm
@pytest.mark.soak
@pytest.mark.parametrize("switches", [("ioeventfd",), ("irqfd",), ("ioeventfd", "irqfd")])
def test_a_guest_that_boots_without(
    kernel: Kernel, guest_initrd: Path, switches: tuple[str, ...]
) -> None:
    report = proof(kernel, guest_initrd, *(f"--without={switch}" for switch in switches))
    for moved in (report["file"], report["iperf3"]):
        check_python(moved, doorbells="ioeventfd" in switches, raised="irqfd" in switches)
    check_messages(report, 1, 1)


@pytest.mark.vm
@pytest.mark.soak
def test_a_guest_with_a_legacy_driver_and_intx(kernel: Kernel, guest_initrd: Path) -> None:
    append = "pci=nomsi virtio_pci.force_legacy=1"
    report = proof(kernel, guest_initrd, "--short", f"--append={append}")
    guest = report["guest"]
    assert not guest["modern"]
    assert len(guest["interrupts"]) == 1
    assert "IO-APIC" in guest["interrupts"][0]
    check_python(report["file"], raised=True)


@pytest.mark.vm
@pytest.mark.soak
def test_a_guest_of_the_mirror(kernel: Kernel, guest_initrd: Path, module: Path) -> None:
    options = ["--device", NODE, "--module", str(module)]
    report = proof(kernel, guest_initrd, *options, "--resume")
    check_out_of_python(report)
    for life in (report, *report["lives"]):
        assert life["nodes"] == [NODE]
        check_rings(life["rings"])
        check_python(life["file"])


@pytest.mark.vm
@pytest.mark.soak
def test_a_guest_of_the_engine(kernel: Kernel, guest_initrd: Path) -> None:
    report = proof(kernel, guest_initrd, "--device", ENGINE, "--resume")
    check_out_of_python(report)
    for life in (report, *report["lives"]):
        assert life["nodes"] == []
        check_python(life["file"])


@pytest.mark.vm
@pytest.mark.soak
def test_a_guest_moves_from_one_vhost_to_another(
    kernel: Kernel, guest_initrd: Path, module: Path
) -> None:
    """From the kernel's own to the mirror and back, to the engine and back."""
    ways = [NODE, DEFAULT_PATH, ENGINE, DEFAULT_PATH]
    moves = [f"--resume=--device {device}" for device in ways]
    report = proof(kernel, guest_initrd, "--short", "--module", str(module), *moves)
    nodes = [life["nodes"] for life in report["lives"]]
    assert nodes == [[NODE], [DEFAULT_PATH], [], [DEFAULT_PATH]]
    check_rings(report["lives"][0]["rings"])
    for life in report["lives"]:
        check_python(life["file"])


@pytest.mark.vm
def test_the_example_boots_a_guest(kernel: Kernel, guest_initrd: Path) -> None:
    argv = ["python", "-m", "tests.vm.vmm_example", str(kernel.image), str(guest_initrd)]
    outcome = in_a_vm(kernel, argv)
    assert outcome.status == 0
