"""A guest that does everything wrong, on the vCPU of a `vhostctl vmm run`. Needs /dev/kvm."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.realmode import open_kvm
from tests.support.vmm_net import BITS
from tests.support.vmm_wild import END, ENTRY, LOAD, MEMORY, Program, Wild, finish
from tests.system.test_vmm_hostile import OPERATIONS, Flood, Pc
from tests.unit.test_vmm_boot import bzimage, header
from vhostctl.control.rings import place_rings
from vhostctl.host.netns import NetNamespace
from vhostctl.vmm.log import BURST, PERIOD
from vhostctl.vmm.machine import MachineConfig

pytestmark = pytest.mark.usefixtures("kvm_is_there")

PATIENCE = 400
RINGS = 1 << 20


@pytest.fixture(scope="module")
def kvm_is_there() -> None:
    with open_kvm() as system, system.create_vm():
        return


def program(device: str, seed: int, operations: int) -> Program:
    """Return what a guest does that knows where its card is."""
    with Pc(device, MachineConfig()) as pc:
        made = Program(pc.cpu.slot, pc.pci.homes, pc.pci.capabilities)
        features = pc.net.features
    Wild(made, features, seed).run(operations)
    placed, end = place_rings(RINGS, 5, 256)
    placed[4] = place_rings(placed[4].desc, 1, 64)[0][0]
    finish(made, features & BITS, placed, end)
    return made


def kernel(folder: Path, code: bytes) -> Path:
    code = bytes(ENTRY - LOAD) + code
    code += bytes(-len(code) % 16)
    about = header(syssize=len(code) // 16, pref_address=LOAD, init_size=len(code))
    return bzimage(folder, about, code)


@pytest.mark.parametrize(
    ("seed", "options"),
    [(1, []), (2, ["--no-irqfd"]), (3, ["--no-ioeventfd"])],
    ids=["kvm", "no irqfd", "no ioeventfd"],
)
def test_a_wild_guest_ends_when_it_wants_to(
    device: str, namespace: NetNamespace, tmp_path: Path, seed: int, options: list[str]
) -> None:
    made = program(device, seed, OPERATIONS // 20)
    command = [sys.executable, "-m", "vhostctl", "vmm", "run", "--device", device]
    command += ["--kernel", str(kernel(tmp_path, bytes(made.code))), "--memory", str(MEMORY >> 20)]
    command += ["--tap", "tap0", "--addr", "192.0.2.1/24", "--queues", "2", *options]
    began = time.monotonic()
    with Flood(namespace.run):
        done = namespace.run(
            lambda: subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PATIENCE,
                check=False,
            )
        )
    periods = (time.monotonic() - began) / PERIOD
    *log, last = done.stderr.decode().splitlines()
    print(f"{made.operations} operations, {len(log)} lines: {last}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(END)
    counted = re.fullmatch(
        r"the guest switched itself off; exits to this process: (\d+) port, (\d+) MMIO, .*", last
    )
    assert counted, done.stderr
    assert int(counted[1]) >= made.ports > 0
    assert int(counted[2]) >= made.mmio > 0
    assert b"Traceback" not in done.stderr
    assert len(log) <= BURST * (2 + periods) + 1
